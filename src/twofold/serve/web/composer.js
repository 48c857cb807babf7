// Where messages are written: the field, the mode, the thinking budget, send and stop. What is half typed is kept for
// each conversation. Enter sends, except while an input method is composing, where it belongs to the input method.

import { fill, h, iconButton, segments } from "./dom.js";
import { t } from "./i18n.js";
import { budgetStops } from "./prefs.js";
import { draft, keepDraft } from "./store.js";

/**
 * The composer. `act`: send(text), stop(), editLast(), changed(fields of the settings).
 * update({ prefs, mode, context, budget, running, draftName }) shows the state; focus() and set(text) as they say.
 */
export function composerView(act) {
  const field = h("textarea", {
    id: "message",
    rows: 1,
    placeholder: t("ask"),
    aria: { label: t("message") },
    dir: "auto",
    enterKeyHint: "send",
    oninput: () => (keepDraft(state.draftName, field.value), fit()),
    onkeydown: keydown,
  });
  const controls = h("div.controls");
  const main = h("div.main-button");
  const element = h(
    "div.composer",
    {},
    h("div.composer-card", {}, field, h("div.composer-row", {}, controls, main)),
    h("p.keys-line", {}, t("keys_line")),
  );
  let state = {};
  let drawn = "";

  function keydown(event) {
    if (event.isComposing || event.keyCode === 229) return;
    if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && !field.value) {
      event.preventDefault();
      act.editLast();
    }
  }

  function send() {
    const text = field.value.trim();
    if (!text || state.running) return;
    field.value = "";
    keepDraft(state.draftName, "");
    fit();
    act.send(text);
  }

  function fit() {
    field.style.setProperty("height", "auto");
    field.style.setProperty("height", `${Math.min(field.scrollHeight, 240)}px`);
    element.dataset.ready = Boolean(field.value.trim());
  }

  function update(next) {
    const moved = next.draftName !== state.draftName;
    state = next;
    element.dataset.mode = next.mode;
    if (moved) {
      field.value = draft(next.draftName);
      fit();
    }
    const key = JSON.stringify([next.mode, next.prefs.budget, next.context, next.budget]);
    if (key !== drawn && !controls.contains(document.activeElement)) fill(controls, controlsOf(next));
    drawn = controls.contains(document.activeElement) ? "" : key;
    for (const choice of controls.querySelectorAll("[name=mode]")) choice.checked = choice.value === next.mode;
    controls.querySelector(".budget")?.classList.toggle("off", next.mode === "off");
    fill(main, next.running ? stopButton() : sendButton());
  }

  function controlsOf({ mode, budget: limited }) {
    const switched = ["on", "off", "auto"].includes(mode);
    return [switched && modes(), limited && mode !== "never" && budget()];
  }

  function modes() {
    const options = [
      ["on", "think"],
      ["off", "direct"],
      ["auto", "auto"],
    ].map(([value, key]) => [value, t(key), t(`${key}_hint`)]);
    return segments("mode", t("mode"), options, state.prefs.mode, (mode) => act.changed({ mode }));
  }

  function budget() {
    const stops = budgetStops(state.context);
    const chosen = state.prefs.budget;
    const at =
      chosen === null
        ? stops.length - 1
        : Math.max(
            0,
            stops.findLastIndex((stop) => stop !== null && stop <= chosen),
          );
    const words = (value) => (value === null ? t("no_limit") : t("budget_tokens", { n: value }));
    const shown = h("output", {}, words(chosen));
    const slider = h("input", {
      type: "range",
      min: 0,
      max: stops.length - 1,
      step: 1,
      value: at,
      aria: { label: t("budget"), valuetext: words(chosen) },
      oninput: () => {
        const value = stops[slider.valueAsNumber];
        shown.textContent = words(value);
        slider.setAttribute("aria-valuetext", words(value));
        act.changed({ budget: value });
      },
    });
    return h("label.budget", { title: t("budget") }, h("span", {}, t("budget_short")), slider, shown);
  }

  const sendButton = () => iconButton("up", t("send"), send, { className: "round send" });
  const stopButton = () => iconButton("stop", t("stop"), act.stop, { className: "round stop" });

  return {
    element,
    update,
    focus: () => field.focus(),
    set(text) {
      field.value = text;
      keepDraft(state.draftName, text);
      fit();
      field.focus();
    },
  };
}
