// The conversation on screen: the turns of the picked path, kept at the end while text arrives unless the reader has
// scrolled away, and the opening page of an empty one. Not here: what a turn looks like (message.js).

import { fill, h, icon, mark } from "./dom.js";
import { t } from "./i18n.js";
import { assistantView, userView } from "./message.js";
import { branches, path } from "./tree.js";

const NEAR = 80; // pixels from the end that still count as being there

/** The thread. `act` is what turns can ask for (message.js), with chooseMode(mode) and suggest(text). */
export function threadView(act) {
  const list = h("div.turns");
  const jump = h("button.jump", { type: "button", hidden: true, onclick: () => toEnd() }, icon("down"), t("to_latest"));
  const scroll = h("main.scroll", { id: "thread", tabIndex: -1 }, list);
  const element = h("div.thread", {}, scroll, jump);
  let views = new Map();
  let stuck = true;
  let frame = 0;

  scroll.addEventListener("scroll", measure);
  new ResizeObserver(() => (stuck ? toEnd() : measure())).observe(list);

  function measure() {
    stuck = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR;
    jump.hidden = stuck;
  }

  function toEnd() {
    scroll.scrollTop = scroll.scrollHeight;
    jump.hidden = true;
  }

  /** Shows a conversation from scratch. */
  function show(conversation, opening) {
    const nodes = path(conversation);
    views = new Map();
    const shown = nodes.filter((node) => node.role !== "tool");
    fill(
      list,
      shown.map((node) => turn(conversation, node, nodes)),
    );
    element.dataset.empty = !shown.length;
    if (!shown.length) fill(list, openingPage(opening, act));
    stuck = true;
    toEnd();
  }

  function turn(conversation, node, nodes) {
    const at = nodes.indexOf(node);
    const branch = branches(conversation, node);
    const results = nodes[at + 1]?.role === "tool" ? nodes[at + 1] : undefined;
    const view =
      node.role === "user"
        ? userView(node, branch, act)
        : assistantView(node, branch, results, act, at === nodes.length - 1);
    views.set(node.id, view);
    return view.element;
  }

  /** Brings one node up to date, at most once a frame. */
  function changed(node) {
    if (!views.has(node.id)) return;
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(() => {
      views.get(node.id)?.update();
      if (stuck) toEnd();
    });
  }

  /** Opens the editor of a user turn. */
  function edit(id) {
    views.get(id)?.edit();
  }

  return { element, show, changed, edit, toEnd: () => ((stuck = true), toEnd()) };
}

/** The two modes as the two halves of one sheet, and what the model says it can do. */
function openingPage({ mode, examples }, act) {
  const half = (name, value) =>
    h(
      `button.half.half-${name}`,
      { type: "button", aria: { pressed: String(mode === value) }, onclick: () => act.chooseMode(value) },
      h("b", {}, t(name)),
      h("span", {}, t(`${name}_card`)),
    );
  return h(
    "section.opening",
    {},
    mark(),
    h("h1", {}, "Twofold"),
    h("p.tagline", {}, t("tagline")),
    ["on", "off", "auto"].includes(mode)
      ? h("div.sheet", {}, half("think", "on"), half("direct", "off"))
      : h("p.hint", {}, t(mode === "never" ? "no_thinking" : "always_thinking")),
    examples.length > 0 &&
      h(
        "div.examples",
        {},
        examples.map((text) => h("button.example", { type: "button", onclick: () => act.suggest(text) }, text)),
      ),
  );
}
