// Settings of this browser: appearance, mode, budget, sampling for each mode, tools, key. Checked when read, so that a
// damaged or older value is the default again. Empty sampling fields are null and are not sent: the checkpoint's own
// defaults hold then. Not here: what a request looks like (request.js) and the panel (settings.js).

const KEY = "twofold.prefs";

/** Sampling fields with their bounds, the same for both modes; `usual` is where a slider rests while nothing is set. */
export const FIELDS = [
  { name: "temperature", min: 0, max: 2, step: 0.05, usual: 0.6 },
  { name: "top_p", min: 0.01, max: 1, step: 0.01, usual: 0.95 },
  { name: "top_k", min: 0, max: 200, step: 1, usual: 20 },
  { name: "min_p", min: 0, max: 1, step: 0.01, usual: 0 },
  { name: "presence_penalty", min: -2, max: 2, step: 0.1, usual: 0 },
  { name: "frequency_penalty", min: -2, max: 2, step: 0.1, usual: 0 },
  { name: "repetition_penalty", min: 0.5, max: 2, step: 0.01, usual: 1 },
];
/** Those that may differ after the thought. */
export const ANSWER_FIELDS = FIELDS.slice(0, 4);

const BUDGET_STEPS = [0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768];

/** Stops of the budget slider for a context of so many tokens; null, the last, is no limit. */
export function budgetStops(context) {
  return [...BUDGET_STEPS.filter((step) => !context || step < context), null];
}

const oneOf =
  (...values) =>
  (value) =>
    values.includes(value) ? value : values[0];
const flag = (otherwise) => (value) => (typeof value === "boolean" ? value : otherwise);
const words = (value) => (typeof value === "string" ? value : "");
const whole = (low, high) => (value) => (Number.isInteger(value) && value >= low && value <= high ? value : null);

function sampling(value, fields = FIELDS) {
  const known = {};
  for (const { name, min, max } of fields) {
    const given = value?.[name];
    known[name] = typeof given === "number" && given >= min && given <= max ? given : null;
  }
  return known;
}

const SHAPE = {
  theme: oneOf("auto", "light", "dark"),
  language: oneOf("auto", "en", "zh"),
  mode: oneOf("on", "off", "auto"),
  budget: whole(0, 1e7),
  on: (value) => sampling(value),
  off: (value) => sampling(value),
  answerApart: flag(false),
  answer: (value) => sampling(value, ANSWER_FIELDS),
  maxTokens: whole(1, 1e7),
  seed: whole(0, 2 ** 31),
  record: flag(true),
  alternatives: (value) => whole(0, 20)(value) ?? 5,
  calculator: flag(false),
  tools: words,
  model: words,
  key: words,
};

/** The settings as stored, each checked. */
export function loadPrefs() {
  let stored = {};
  try {
    stored = JSON.parse(localStorage.getItem(KEY)) || {};
  } catch {
    // Not JSON: start from the defaults.
  }
  return Object.fromEntries(Object.entries(SHAPE).map(([name, check]) => [name, check(stored[name])]));
}

/** Writes them; a full storage keeps them for this visit only. */
export function savePrefs(prefs) {
  try {
    localStorage.setItem(KEY, JSON.stringify(prefs));
  } catch {
    // Conversations say that the storage is full (store.js).
  }
}

/** Sampling back to the model's defaults. */
export function resetSampling(prefs) {
  for (const name of ["on", "off", "answer", "answerApart", "maxTokens", "seed"]) prefs[name] = SHAPE[name](undefined);
}
