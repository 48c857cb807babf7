// From a conversation and the settings to the body of a chat request. The names are those of OpenAI's API and of
// Qwen's services (enable_thinking, thinking_budget). What is not set is not sent, so that the checkpoint decides.

import { CALCULATOR } from "./calc.js";
import { ANSWER_FIELDS, FIELDS } from "./prefs.js";

/** How `card`, an entry of /v1/models, will think: the chosen mode, or "always" or "never" where it has no switch. */
export function modeOf(prefs, card) {
  const can = card?.capabilities || {};
  if (can.thinking === false) return "never";
  return can.thinking_switch === false ? "always" : prefs.mode;
}

/** The request for a reply after `nodes` (root to the turn that is answered) from the model of `card`. */
export function chatRequest(system, nodes, prefs, card) {
  const usage = { include_usage: true, continuous_usage_stats: !prefs.record }; // tokens are counted by their entries
  const mode = modeOf(prefs, card);
  const silent = mode === "off" || mode === "never";
  const body = { model: card.id, messages: messages(system, nodes), stream: true, stream_options: usage };
  if (mode === "on" || mode === "off") body.enable_thinking = mode === "on";
  if (!silent && prefs.budget !== null && card.capabilities?.thinking_budget !== false)
    body.thinking_budget = prefs.budget;
  Object.assign(body, given(prefs[silent ? "off" : "on"], FIELDS));
  if (!silent && prefs.answerApart) body.post_thinking = given(prefs.answer, ANSWER_FIELDS);
  if (prefs.maxTokens !== null) body.max_tokens = prefs.maxTokens;
  if (prefs.seed !== null) body.seed = prefs.seed;
  if (prefs.record) Object.assign(body, { logprobs: true, top_logprobs: prefs.alternatives });
  const tools = offeredTools(prefs);
  if (tools.length) body.tools = tools;
  return body;
}

function given(values, fields) {
  return Object.fromEntries(fields.map(({ name }) => [name, values[name]]).filter(([, value]) => value !== null));
}

/** The turns as messages. Thoughts go along: whether past ones are shown to the model is the checkpoint's policy. */
export function messages(system, nodes) {
  const turns = system.trim() ? [{ role: "system", content: system }] : [];
  for (const node of nodes) {
    if (node.role === "user") turns.push({ role: "user", content: node.content });
    else if (node.role === "tool") {
      for (const { id, content } of node.results) turns.push({ role: "tool", tool_call_id: id, content });
    } else if (node.content || node.calls.length) turns.push(assistant(node));
  }
  return turns;
}

function assistant(node) {
  const turn = { role: "assistant", content: node.content };
  if (node.reasoning) turn.reasoning_content = node.reasoning;
  if (node.calls.length) {
    turn.tool_calls = node.calls.map((call) => ({
      id: call.id,
      type: "function",
      function: { name: call.name, arguments: call.arguments },
    }));
  }
  return turn;
}

/** Tools that the settings offer: the calculator, and a list in OpenAI's form. */
export function offeredTools(prefs) {
  return [...(prefs.calculator ? [CALCULATOR] : []), ...(parseTools(prefs.tools) || [])];
}

/** A list of tools from JSON text; [] for empty text, null where it is no such list. */
export function parseTools(source) {
  if (!source.trim()) return [];
  try {
    const list = JSON.parse(source);
    const good = Array.isArray(list) && list.every((tool) => typeof tool?.function?.name === "string");
    return good ? list : null;
  } catch {
    return null;
  }
}
