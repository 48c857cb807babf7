// Calls that a model makes, as cards: the name, the arguments, and the result below them. A result that the page cannot
// compute is typed by the reader; half-typed results survive a reload. Running the calculator is calc.js.

import { h, icon } from "./dom.js";
import { t } from "./i18n.js";
import { draft, keepDraft } from "./store.js";

/**
 * Cards for the calls of `node`. `results` is the tool node that answers them, or undefined while none does; then
 * `onResults(list of texts)` is called when the reader sends what was typed, and null means that no results are wanted.
 */
export function toolCards(node, results, onResults) {
  const fields = [];
  const cards = node.calls.map((call, index) => {
    const answer = results?.results[index];
    const outcome = answer ? resultNode(answer.content) : onResults && resultField(node, call, index, fields);
    return h(
      "section.call",
      {},
      h("header", {}, icon("tool"), h("span", {}, t("tool_call")), h("code", {}, call.name)),
      h("pre", { tabIndex: 0 }, pretty(call.arguments)),
      outcome,
    );
  });
  if (results || !onResults) return cards;
  const send = () => onResults(fields.map((field) => field.value));
  const label = t(fields.length > 1 ? "tool_results_send" : "tool_send");
  return [
    ...cards,
    h(
      "div.call-send",
      {},
      h("span", {}, t("tool_waiting")),
      h("button.text-button", { type: "button", onclick: send }, label),
    ),
  ];
}

function resultNode(content) {
  return h("div.call-result", {}, h("span", {}, t("tool_result")), h("pre", { tabIndex: 0 }, content));
}

function resultField(node, call, index, fields) {
  const name = draftName(node, index);
  const field = h("textarea", {
    rows: 2,
    value: draft(name),
    aria: { label: `${t("tool_result")}: ${call.name}` },
    oninput: () => keepDraft(name, field.value),
  });
  fields.push(field);
  return h("label.call-result", {}, h("span", {}, t("tool_result")), field);
}

/** The draft of one result. */
export const draftName = (node, index) => `tool:${node.id}:${index}`;

function pretty(source) {
  try {
    const value = JSON.parse(source);
    const line = JSON.stringify(value);
    return line.length <= 60 ? line : JSON.stringify(value, null, 2);
  } catch {
    return source; // still arriving, or no JSON
  }
}
