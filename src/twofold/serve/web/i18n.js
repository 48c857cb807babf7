// Words in the reader's language. All of them are in strings.js; nothing else on the page holds text of its own.

import { STRINGS } from "./strings.js";

export const LANGUAGES = [
  ["en", "English"],
  ["zh", "中文"],
];

let column = 0;

/** Chooses the language: "en", "zh", or the browser's own for anything else. */
export function setLanguage(choice) {
  const known = LANGUAGES.map(([code]) => code);
  const code = known.includes(choice) ? choice : (navigator.language || "en").startsWith("zh") ? "zh" : "en";
  column = known.indexOf(code);
  document.documentElement.lang = code === "zh" ? "zh-CN" : "en";
}

/**
 * The text of a key with {name} filled in. "one|many" in a text is chosen by {n}.
 * An unknown key is a mistake in the program and throws.
 */
export function t(key, values = {}) {
  const entry = STRINGS[key];
  if (!entry) throw new Error(`no text for ${key}`);
  const [one, many] = entry[column].split("|");
  const text = many !== undefined && values.n !== 1 ? many : one;
  return text.replace(/\{(\w+)\}/g, (_, name) =>
    typeof values[name] === "number" ? number(values[name]) : values[name],
  );
}

/** A count with separators. */
export function number(value) {
  return new Intl.NumberFormat(document.documentElement.lang).format(value);
}

/** "0.34 s", "12 s", "2 min 5 s" from milliseconds. */
export function seconds(ms) {
  const s = ms / 1000;
  if (s >= 100) return t("minutes", { m: Math.floor(s / 60), s: Math.round(s % 60) });
  return t("seconds", { s: s < 1 ? s.toFixed(2) : s < 10 ? s.toFixed(1) : String(Math.round(s)) });
}

/** A day as people say it: the hour today, the date otherwise. */
export function day(time) {
  const date = new Date(time);
  const today = date.toDateString() === new Date().toDateString();
  const style = today ? { hour: "2-digit", minute: "2-digit" } : { month: "short", day: "numeric" };
  return new Intl.DateTimeFormat(document.documentElement.lang, style).format(date);
}
