// The settings panel: system prompt of the conversation, budget, sampling for each mode, probabilities, tools,
// appearance, connection, keys. Every change is passed on at once; there is nothing to save.

import { fill, h, iconButton, segments } from "./dom.js";
import { LANGUAGES, t } from "./i18n.js";
import { ANSWER_FIELDS, FIELDS } from "./prefs.js";
import { parseTools } from "./request.js";

/** The keys of the page, [keys, text]. */
export const SHORTCUTS = [
  ["Enter", "key_send"],
  ["Shift+Enter", "key_line"],
  ["Esc", "key_stop"],
  ["↑", "key_edit"],
  ["/", "key_focus"],
  ["Alt+M", "key_mode"],
  ["Alt+N", "key_new"],
  ["Alt+S", "key_settings"],
  ["?", "key_help"],
];

/**
 * The panel. `act`: changed(fields), system(text), reset(), close().
 * draw({ prefs, conversation, models, model, mode }, fresh) makes it anew; `models` are entries of
 * /v1/models, `model` the chosen one; its `defaults` for "on" and "off" are shown where nothing is set.
 */
export function settingsView(act) {
  const body = h("div.settings-body");
  const element = h(
    "aside.settings",
    { id: "settings", aria: { label: t("settings") } },
    h("header", {}, h("h2", {}, t("settings")), iconButton("close", t("close"), act.close)),
    body,
  );
  let tab = null;
  let shown = null;

  function draw(state, fresh = false) {
    shown = state;
    if (fresh) tab = null;
    const silent = ["off", "never"].includes(state.mode);
    if (tab === null || ["always", "never"].includes(state.mode)) tab = silent ? "off" : "on";
    fill(
      body,
      prompt(state),
      sampling(state),
      record(state),
      tools(state),
      appearance(state),
      connection(state),
      keys(),
    );
  }

  const again = () => draw(shown);

  function prompt({ conversation }) {
    const field = h("textarea", {
      rows: 4,
      value: conversation.system,
      dir: "auto",
      id: "system-prompt",
      oninput: () => act.system(field.value),
    });
    return section("this_chat", h("label.stacked", {}, h("span", {}, t("system_prompt")), field), hint("system_hint"));
  }

  function sampling({ prefs, mode, model }) {
    const switched = ["on", "off", "auto"].includes(mode);
    const tabs = segments(
      "sampling-mode",
      t("mode"),
      [
        ["on", t("think")],
        ["off", t("direct")],
      ],
      tab,
      (value) => ((tab = value), again()),
    );
    const rows = FIELDS.map((spec) =>
      fieldRow(spec, prefs[tab][spec.name], model?.defaults?.[tab]?.[spec.name], (value) =>
        act.changed({ [tab]: { ...prefs[tab], [spec.name]: value } }),
      ),
    );
    return section(
      "sampling",
      switched && tabs,
      switched && hint("sampling_hint"),
      rows,
      tab === "on" && [budgetRow(prefs), apart(prefs)],
      fieldRow(
        { name: "max_tokens", min: 1, max: 1e7, step: 1, plain: true },
        prefs.maxTokens,
        undefined,
        (maxTokens) => act.changed({ maxTokens }),
      ),
      fieldRow({ name: "seed", min: 0, max: 2 ** 31, step: 1, plain: true }, prefs.seed, t("random"), (seed) =>
        act.changed({ seed }),
      ),
      h("button.text-button.quiet", { type: "button", onclick: () => (act.reset(), again()) }, t("reset")),
    );
  }

  function budgetRow(prefs) {
    const spec = { name: "budget", min: 0, max: 1e7, step: 1, plain: true, title: t("budget_exact") };
    return fieldRow(spec, prefs.budget, t("no_limit"), (budget) => act.changed({ budget }));
  }

  /** Sampling after the thought, where it differs. */
  function apart(prefs) {
    const change = (answerApart) => (act.changed({ answerApart }), again());
    const rows = ANSWER_FIELDS.map((spec) =>
      fieldRow(spec, prefs.answer[spec.name], undefined, (value) =>
        act.changed({ answer: { ...prefs.answer, [spec.name]: value } }),
      ),
    );
    return [check("answer_part", prefs.answerApart, change), prefs.answerApart && h("div.indented", {}, rows)];
  }

  function record({ prefs }) {
    const spec = { name: "alternatives", min: 0, max: 20, step: 1, usual: 5 };
    return section(
      "probabilities",
      check("record", prefs.record, (value) => (act.changed({ record: value }), again())),
      prefs.record && fieldRow(spec, prefs.alternatives, "5", (value) => act.changed({ alternatives: value ?? 5 })),
    );
  }

  function tools({ prefs }) {
    const bad = h("p.hint.bad", { hidden: parseTools(prefs.tools) !== null, role: "alert" }, t("tools_bad"));
    const field = h("textarea.code-field", {
      rows: 4,
      value: prefs.tools,
      spellcheck: false,
      placeholder: '[{"type": "function", "function": {"name": "…"}}]',
      oninput: () => ((bad.hidden = parseTools(field.value) !== null), act.changed({ tools: field.value })),
    });
    return section(
      "tools",
      check("tool_calc", prefs.calculator, (calculator) => act.changed({ calculator })),
      h("label.stacked", {}, h("span", {}, t("tools_json")), field),
      bad,
      hint("tools_hint"),
    );
  }

  function appearance({ prefs }) {
    const themes = [
      ["auto", t("theme_auto")],
      ["light", t("light")],
      ["dark", t("dark")],
    ];
    const languages = [["auto", t("theme_auto")], ...LANGUAGES];
    return section(
      "appearance",
      h(
        "div.line",
        {},
        h("span", {}, t("theme")),
        segments("theme", t("theme"), themes, prefs.theme, (theme) => act.changed({ theme })),
      ),
      h(
        "div.line",
        {},
        h("span", {}, t("language")),
        segments("language", t("language"), languages, prefs.language, (language) => act.changed({ language })),
      ),
    );
  }

  function connection({ prefs, models, model }) {
    const choose = h(
      "select",
      { onchange: () => act.changed({ model: choose.value }) },
      models.map(({ id }) => h("option", { value: id, selected: id === model?.id }, id)),
    );
    const key = h("input", {
      type: "password",
      value: prefs.key,
      autocomplete: "off",
      onchange: () => act.changed({ key: key.value.trim() }),
    });
    return section(
      "connection",
      models.length > 0 && h("label.line", {}, h("span", {}, t("model")), choose),
      model?.max_model_len && h("p.hint", {}, t("context", { n: model.max_model_len })),
      h("label.line", {}, h("span", {}, t("api_key")), key),
      hint("api_key_hint"),
    );
  }

  return { element, draw };
}

function keys() {
  return section(
    "keys",
    h(
      "dl.key-list",
      {},
      SHORTCUTS.map(([combination, text]) => [
        h(
          "dt",
          {},
          combination.split("+").map((key) => h("kbd", {}, key)),
        ),
        h("dd", {}, t(text)),
      ]),
    ),
  );
}

function section(title, ...kids) {
  return h("section", {}, h("h3", {}, t(title)), kids);
}

const hint = (key) => h("p.hint", {}, t(key));

function check(key, checked, onchange) {
  const box = h("input", { type: "checkbox", checked, onchange: () => onchange(box.checked) });
  return h("label.check", {}, box, h("span", {}, t(key)));
}

/**
 * A number with a slider (none where `plain`); empty is null, the default, which `otherwise` shows.
 */
function fieldRow({ name, min, max, step, usual, plain, title }, value, otherwise, onchange) {
  const input = h("input", {
    type: "number",
    min,
    max,
    step: "any",
    value: value ?? "",
    placeholder: typeof otherwise === "number" ? String(otherwise) : (otherwise ?? t("default")),
    title: title || "",
    inputMode: "decimal",
    aria: { label: t(name) },
  });
  const slider =
    !plain &&
    h("input", {
      type: "range",
      min,
      max,
      step,
      value: value ?? (typeof otherwise === "number" ? otherwise : (usual ?? min)),
      tabIndex: -1,
      aria: { hidden: "true" },
    });
  const row = h("div.field", { data: { field: name, set: value !== null } }, h("span", {}, t(name)), slider, input);
  const take = (given) => {
    row.dataset.set = given !== null;
    onchange(given);
  };
  input.addEventListener("input", () => {
    const given = input.value === "" ? null : input.valueAsNumber;
    const good = given === null || (given >= min && given <= max && (step < 1 || Number.isInteger(given)));
    input.setAttribute("aria-invalid", String(!good));
    if (!good) return;
    if (slider && given !== null) slider.value = given;
    take(given);
  });
  if (slider)
    slider.addEventListener(
      "input",
      () => ((input.value = slider.value), input.removeAttribute("aria-invalid"), take(slider.valueAsNumber)),
    );
  return row;
}
