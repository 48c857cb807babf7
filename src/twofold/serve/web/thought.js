// The panel of one thought: streams while the model thinks, folds when the answer begins (unless the reader has
// decided otherwise), says how long it took and how much of the budget it used, and marks a forced stop.

import { fill, h, icon } from "./dom.js";
import { seconds, t } from "./i18n.js";
import { showMarkdown } from "./markdown.js";

/** A panel for an assistant node; call update() after each change of the node. */
export function thoughtPanel(node) {
  const label = h("span.thought-label");
  const meta = h("span.thought-meta");
  const body = h("div.thought-text", {
    id: `thought-${node.id}`,
    tabIndex: 0,
    role: "region",
    aria: { label: t("thought_text") },
    dir: "auto",
  });
  const meter = h("progress.meter", { max: 1, aria: { label: t("budget") } });
  const mark = h("span.forced", { title: t("forced_hint") }, t("forced"));
  const loop = h("span.forced", {}, t("looped"));
  let chosen = null; // the reader's own choice, once made
  let shown = null;

  const head = h(
    "button.thought-head",
    { type: "button", aria: { controls: body.id }, onclick: () => ((chosen = !isOpen()), update()) },
    h("span.thought-sign", { aria: { hidden: "true" } }),
    label,
    meta,
    icon("down"),
  );
  const panel = h(
    "section.thought",
    {},
    head,
    meter,
    h("div.thought-fold", {}, h("div.thought-frame", {}, body)),
    h("div.thought-marks", {}, mark, loop),
  );

  const thinking = () => node.state === "streaming" && !node.content.trim() && !node.calls.length;
  const isOpen = () => chosen ?? thinking();

  function update() {
    const { stats } = node;
    const open = isOpen();
    panel.dataset.open = open;
    panel.dataset.live = thinking();
    head.setAttribute("aria-expanded", open);
    body.inert = !open;
    label.textContent = heading(node, thinking());
    fill(meta, stats.thinkMs >= 100 && h("span", {}, seconds(stats.thinkMs)), amount(stats, thinking()));
    meter.hidden = !stats.budget;
    if (stats.budget) meter.value = Math.min(1, (stats.reasoning || 0) / stats.budget);
    mark.hidden = !stats.forced;
    loop.hidden = !stats.looped;
    if (open && shown !== node.reasoning) showText();
  }

  function showText() {
    const below = body.scrollHeight - body.scrollTop - body.clientHeight < 40;
    showMarkdown(body, node.reasoning.trim());
    shown = node.reasoning;
    if (below && thinking()) body.scrollTop = body.scrollHeight;
  }

  update();
  return { element: panel, update };
}

function heading(node, thinking) {
  if (thinking) return t("thinking_now");
  const n = node.stats.reasoning || 0;
  const broken = !node.content.trim() && !node.calls.length && node.state !== "done";
  return t(broken ? "thought_cut" : "thought_for", { n });
}

/** Live: tokens so far, of the budget if there is one. */
function amount(stats, thinking) {
  const n = stats.reasoning || 0;
  if (stats.budget) return h("span", {}, t("of_budget", { n, budget: stats.budget }));
  return thinking && h("span", {}, t("tokens", { n }));
}
