// One turn on screen: a user turn that can be edited into a new branch, or an assistant turn with its thought, answer,
// calls, counts, errors and actions. A view is made once for each node and brought up to date while the node changes.

import { fill, h, icon, iconButton } from "./dom.js";
import { seconds, t } from "./i18n.js";
import { copyText, showMarkdown } from "./markdown.js";
import { tokenView } from "./probs.js";
import { draft, keepDraft } from "./store.js";
import { thoughtPanel } from "./thought.js";
import { toolCards } from "./toolcards.js";

/** The view of a user turn. `branch` is { at, ids }; `act` has edit(node, text) and pick(id). */
export function userView(node, branch, act) {
  const element = h("article.turn.user", { data: { id: node.id }, aria: { label: t("you") } });
  const name = `edit:${node.id}`;

  function showText() {
    fill(
      element,
      h("div.bubble", { dir: "auto" }, node.content),
      h(
        "footer",
        {},
        branchArrows(branch, act),
        actionBar(
          iconButton("copy", t("copy"), () => copyText(node.content)),
          iconButton("pencil", t("edit"), edit),
        ),
      ),
    );
  }

  function edit() {
    const leave = () => (keepDraft(name, ""), showText());
    const field = h("textarea", {
      value: draft(name) || node.content,
      rows: 3,
      aria: { label: t("edit") },
      oninput: () => keepDraft(name, field.value),
      onkeydown: (event) => {
        if (event.key === "Enter" && !event.shiftKey && !event.isComposing) (event.preventDefault(), send());
        if (event.key === "Escape") (event.stopPropagation(), leave());
      },
    });
    const send = () => field.value.trim() && (keepDraft(name, ""), act.edit(node, field.value));
    fill(
      element,
      h(
        "div.editor",
        {},
        field,
        h(
          "div.row",
          {},
          h("button.text-button.quiet", { type: "button", onclick: leave }, t("cancel")),
          h("button.text-button", { type: "button", onclick: send }, t("save_send")),
        ),
      ),
    );
    field.focus();
  }

  showText();
  if (draft(name)) edit();
  return { element, update() {}, edit };
}

/**
 * The view of an assistant turn. `branch` as above; `results` is the tool node that answers its calls; `act` has
 * regenerate(node), retry(node), pick(id), results(node, texts), openSettings(). `last`: nothing follows it.
 */
export function assistantView(node, branch, results, act, last) {
  const answer = h("div.answer", { dir: "auto" });
  const thought = h("div");
  const calls = h("div.calls");
  const notice = h("div");
  const stats = h("span.stats");
  const actions = h("div.actions");
  const foot = h("footer", {}, branchArrows(branch, act), actions, stats);
  const element = h(
    "article.turn.assistant",
    { data: { id: node.id }, aria: { label: node.model || "Twofold" } },
    thought,
    answer,
    calls,
    notice,
    foot,
  );
  let panel = null;
  let probabilities = false;
  const drawn = {};

  /** Draws a part again only when what it shows has changed. */
  function part(name, key, draw) {
    if (drawn[name] !== key) draw();
    drawn[name] = key;
  }

  function update() {
    const live = node.state === "streaming";
    element.dataset.state = node.state;
    if (node.reasoning.trim()) {
      if (!panel) fill(thought, (panel = thoughtPanel(node)).element);
      panel.update();
    }
    thought.hidden = probabilities;
    part("answer", `${probabilities}${node.content}${probabilities ? node.tokens.length : ""}`, showAnswer);
    part("calls", JSON.stringify([node.calls, results?.id, live]), () => fill(calls, callCards(live)));
    part("notice", JSON.stringify([node.state, node.error, node.finish, node.warnings, node.content === ""]), () =>
      fill(notice, notices(node, act)),
    );
    part("actions", `${live}${probabilities}`, () =>
      fill(actions, live || (node.state === "error" && !node.tokens.length && !node.content) ? [] : buttons()),
    );
    fill(stats, counts(node));
  }

  function showAnswer() {
    if (probabilities) {
      answer.blocks = null;
      fill(answer, node.tokens.length ? tokenView(node.tokens) : h("p.hint", {}, t("probs_none")));
      return;
    }
    if (!answer.blocks) fill(answer);
    showMarkdown(answer, node.content.trim());
  }

  function callCards(live) {
    if (!node.calls.length) return [];
    const wanted = !live && last && node.state === "done";
    return toolCards(node, results, wanted ? (texts) => act.results(node, texts) : null);
  }

  function buttons() {
    const toggle = () => ((probabilities = !probabilities), update());
    const list = [
      iconButton("copy", t("copy"), () => copyText(node.content)),
      iconButton("again", t("regenerate"), () => act.regenerate(node)),
    ];
    return [...list, iconButton("bars", t("probabilities"), toggle, { aria: { pressed: String(probabilities) } })];
  }

  update();
  return { element, update, edit() {} };
}

/** What went wrong or short with a reply, below it. */
function notices(node, act) {
  if (node.state === "error") return errorCard(node.error, () => act.retry(node), act.openSettings);
  const silent = node.state === "done" && !node.content.trim() && !node.calls.length;
  const marks = [
    node.state === "stopped" && t("stopped"),
    node.state === "interrupted" && t("interrupted"),
    node.finish === "length" && t("cut_length"),
    silent && node.finish !== "length" && t("empty_reply"),
    ...(node.warnings || []),
  ].filter(Boolean);
  return marks.map((text) => h("p.mark-line", {}, text));
}

/** A failure in plain words, with what can be done about it. */
export function errorCard(error, retry, openSettings) {
  const key = `error_${error.kind}`;
  const text = error.kind === "busy" && error.wait ? t("error_busy_in", { s: error.wait }) : t(key);
  return h(
    "div.error",
    { role: "alert" },
    icon("warn"),
    h("div", {}, h("p", {}, text), error.message && h("p.error-detail", {}, t("error_says", { text: error.message }))),
    h(
      "div.row",
      {},
      error.kind === "key" && h("button.text-button.quiet", { type: "button", onclick: openSettings }, t("settings")),
      h("button.text-button", { type: "button", onclick: retry }, t("retry")),
    ),
  );
}

function actionBar(...buttons) {
  return h("div.actions", {}, buttons);
}

function branchArrows({ at, ids }, act) {
  if (ids.length < 2) return null;
  const step = (by, label) =>
    iconButton(by < 0 ? "left" : "right", label, () => act.pick(ids[at + by]), { disabled: !ids[at + by] });
  return h(
    "div.branches",
    { role: "group", aria: { label: t("branch_of", { i: at + 1, n: ids.length }) } },
    step(-1, t("branch_before")),
    h("span", {}, `${at + 1} / ${ids.length}`),
    step(1, t("branch_after")),
  );
}

/** "128 tokens · 42 tokens/s · first after 0.3 s", live and at rest. */
function counts({ stats, state }) {
  if (!stats.completion) return state === "streaming" ? [h("span.waiting", {}, t("waiting"))] : [];
  const time = stats.totalMs - stats.firstMs;
  const speed = time > 30 && stats.completion > 1 ? (1000 * (stats.completion - 1)) / time : 0;
  const hint = stats.prompt ? t("prompt_tokens", { n: stats.prompt }) : "";
  const cached = stats.cached ? t("cached", { n: stats.cached, all: stats.prompt }) : "";
  const parts = [
    t("tokens", { n: stats.completion }),
    speed && t("per_second", { s: speed < 10 ? speed.toFixed(1) : Math.round(speed) }),
  ];
  if (state !== "streaming" && stats.firstMs) parts.push(t("first_after", { time: seconds(stats.firstMs) }));
  return parts.filter(Boolean).map((text) => h("span", { title: [hint, cached].filter(Boolean).join(" · ") }, text));
}
