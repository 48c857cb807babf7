// The token view of an answer: every token as sampled, control tokens included, coloured by the probability the model
// gave it; pointing at one, or reaching it with the arrow keys, shows what else it could have been. Tokens that the
// engine wrote (the end of a thought whose budget was spent) are outlined.

import { fill, h } from "./dom.js";
import { number, t } from "./i18n.js";

const BOUNDS = [0.9, 0.7, 0.4, 0.15]; // level 0 is >= 0.9, level 4 the rest

/** The view of a node's tokens: [text, log-probability, alternatives, forced] each. */
export function tokenView(tokens) {
  const spans = tokens.map((token, index) => tokenSpan(token, index));
  const card = h("div.token-card", { id: "token-card", role: "status" });
  const flow = h("div.tokens", { tabIndex: 0, role: "group", dir: "auto", aria: { label: t("probabilities") } }, spans);
  const view = h("div.token-view", {}, legend(tokens), flow, card);
  let current = -1;

  function show(index) {
    spans[current]?.classList.remove("current");
    current = index;
    const span = spans[index];
    card.hidden = !span;
    if (!span) return;
    span.classList.add("current");
    fill(card, cardRows(tokens[index]));
    place(card, span, view);
  }

  const at = (event) => Number(event.target.closest?.(".token")?.dataset.index ?? -1);
  flow.addEventListener("pointerover", (event) => at(event) >= 0 && show(at(event)));
  flow.addEventListener("click", (event) => at(event) >= 0 && show(at(event)));
  flow.addEventListener("pointerleave", () => document.activeElement !== flow && show(-1));
  flow.addEventListener("focus", () => current < 0 && flow.matches(":focus-visible") && show(0));
  flow.addEventListener("blur", () => show(-1));
  flow.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.min(spans.length - 1, Math.max(0, current + step)));
    spans[current].scrollIntoView({ block: "nearest" });
  });
  show(-1);
  return view;
}

function tokenSpan([text, logprob, , forced], index) {
  const level = BOUNDS.findIndex((bound) => Math.exp(logprob) >= bound);
  const kind = forced ? "forced" : `p${level < 0 ? BOUNDS.length : level}`;
  const control = /^<[^\s<>]+>$/.test(text) ? ".control" : "";
  return h(`span.token.${kind}${control}`, { data: { index } }, text.replace(/\n/g, "↵\n"));
}

/** Under the token, inside the view. */
function place(card, span, view) {
  const box = view.getBoundingClientRect();
  const spot = span.getClientRects()[0] || span.getBoundingClientRect();
  const left = Math.max(0, Math.min(spot.left - box.left, box.width - card.offsetWidth));
  card.style.setProperty("--x", `${left}px`);
  card.style.setProperty("--y", `${spot.bottom - box.top + 6}px`);
}

function cardRows([text, logprob, others, forced]) {
  const listed = others.some(([other]) => other === text);
  return [
    h("div.token-head", {}, h("code", {}, visible(text)), h("b", {}, percent(logprob))),
    forced ? h("p", {}, t("probs_forced")) : null,
    others.map(([other, logprobOf]) =>
      h(
        `div.token-row${other === text ? ".chosen" : ""}`,
        {},
        h("code", {}, visible(other)),
        h("meter", { max: 1, value: Math.exp(logprobOf) }),
        h("span", {}, percent(logprobOf)),
      ),
    ),
    others.length && !listed ? h("p", {}, t("probs_rank", { n: others.length })) : null,
  ];
}

function legend(tokens) {
  const own = tokens.filter((token) => !token[3]);
  const mean = own.reduce((sum, token) => sum + token[1], 0) / Math.max(1, own.length);
  const labels = ["≥ 90 %", "70–90", "40–70", "15–40", "< 15 %"];
  return h(
    "div.token-legend",
    {},
    h("span", {}, t("probs_legend")),
    labels.map((label, level) => h(`span.token.p${level}`, {}, label)),
    own.length < tokens.length && h("span.token.forced", {}, t("forced")),
    h("span", {}, t("probs_mean", { p: number(Number(Math.exp(-mean).toPrecision(3))) })),
    h("span.hint", {}, t("probs_keys")),
  );
}

function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  return `${share >= 99.95 ? "100" : share >= 10 ? share.toFixed(1) : share.toPrecision(2)} %`;
}

/** A token with its white space to be seen. */
function visible(text) {
  return text.replace(/ /g, "␣").replace(/\n/g, "↵").replace(/\t/g, "⇥") || "∅";
}
