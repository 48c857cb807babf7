// Markdown inside a line: emphasis, code, links, maths, line breaks, as nodes. Emphasis follows CommonMark's rules of
// delimiter runs, except that CJK characters count as boundaries, so that **“重点”**文字 is bold. Links go only to
// http, https and mailto; anything else (javascript:, data:) stays text.

import { h } from "./dom.js";
import { maths } from "./tex.js";

const ESCAPABLE = /[!-/:-@[-`{-~]/;
const BARE_URL = /^https?:\/\/[^\s<>"'`]+/;
const PLAIN = /^[^\\`*_~$[\]<!h\n]+/;
const CJK = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}\u3000-\u303f\uff00-\uffef]/u;

/** The nodes of one stretch of text. */
export function inline(source) {
  const pieces = [];
  let at = 0;
  while (at < source.length) {
    const [piece, length] = readPiece(source, at);
    if (typeof piece === "string" && typeof pieces.at(-1) === "string") pieces[pieces.length - 1] += piece;
    else pieces.push(piece);
    at += length;
  }
  return emphasise(pieces);
}

/** What begins at `at`: [text, node or delimiter run, its length in the source]. */
function readPiece(source, at) {
  const rest = source.slice(at);
  const plain = PLAIN.exec(rest);
  if (plain) return [plain[0], plain[0].length];
  const read = READERS[rest[0]];
  return (read && read(rest, source, at)) || [rest[0], 1];
}

const READERS = {
  "\\": readBackslash,
  "`": readCode,
  "*": readRun,
  _: readRun,
  "~": (rest, source, at) => (rest.startsWith("~~") ? readRun(rest, source, at) : null),
  $: readDollar,
  "[": readLink,
  "!": readImage,
  "<": readAngle,
  h: readUrl,
  "\n": () => [h("br"), 1],
};

function readBackslash(rest) {
  if (rest.startsWith("\\(")) return between(rest, "\\(", "\\)", false);
  if (rest.startsWith("\\[")) return between(rest, "\\[", "\\]", true);
  if (rest[1] === "\n") return [h("br"), 2];
  return ESCAPABLE.test(rest[1] || "") ? [rest[1], 2] : null;
}

function between(rest, open, close, display) {
  const end = rest.indexOf(close, open.length);
  return end < 0 ? null : [maths(rest.slice(open.length, end), display), end + close.length];
}

/** $…$ where it cannot be a price: no space inside the marks, no digit right after. */
function readDollar(rest) {
  if (rest.startsWith("$$")) return between(rest, "$$", "$$", true);
  const found = /^\$((?:[^$\\\n]|\\[^\n])+)\$(?!\d)/.exec(rest);
  return found && !/^\s|\s$/.test(found[1]) ? [maths(found[1], false), found[0].length] : null;
}

function readCode(rest) {
  const ticks = /^`+/.exec(rest)[0];
  const close = new RegExp(`(?<!\`)${ticks}(?!\`)`, "g");
  close.lastIndex = ticks.length;
  const end = close.exec(rest);
  if (!end) return [ticks, ticks.length];
  const text = rest.slice(ticks.length, end.index).replace(/\n/g, " ");
  return [h("code", {}, /^ .*[^ ].* $/.test(text) ? text.slice(1, -1) : text), end.index + ticks.length];
}

function readLink(rest) {
  const label = labelEnd(rest);
  const target =
    label > 0 &&
    /^\(\s*(?:<([^<>\n]*)>|((?:[^\s()]|\([^\s()]*\))*))(?:\s+(?:"[^"]*"|'[^']*'))?\s*\)/.exec(rest.slice(label + 1));
  if (!target) return null;
  const address = target[1] ?? target[2];
  const length = label + 1 + target[0].length;
  const text = rest.slice(1, label);
  return safe(address) ? [link(address, inline(text)), length] : [h("span", { title: address }, inline(text)), length];
}

/** Where the bracket that opens `rest` closes, or -1. */
function labelEnd(rest) {
  let depth = 0;
  for (let at = 0; at < rest.length && at < 2000; at += 1) {
    if (rest[at] === "\\") at += 1;
    else if (rest[at] === "[") depth += 1;
    else if (rest[at] === "]" && (depth -= 1) === 0) return at;
  }
  return -1;
}

function readImage(rest) {
  const found = rest[1] === "[" && readLink(rest.slice(1));
  return found ? [found[0], found[1] + 1] : null;
}

function readAngle(rest) {
  const lineBreak = /^<br\s*\/?>/i.exec(rest);
  if (lineBreak) return [h("br"), lineBreak[0].length];
  const address = /^<((?:https?|mailto):[^\s<>]+)>/.exec(rest);
  return address && safe(address[1]) ? [link(address[1], [address[1]]), address[0].length] : null;
}

function readUrl(rest, source, at) {
  const found = /[\w@./]/.test(source[at - 1] || "") ? null : BARE_URL.exec(rest);
  if (!found) return null;
  let address = found[0].replace(/[\u3000-\u303f\uff00-\uffef].*$/u, "").replace(/[*_~.,:;!?]+$/, "");
  if (address.endsWith(")") && !address.includes("(")) address = address.slice(0, -1);
  return safe(address) ? [link(address, [address]), address.length] : null;
}

function safe(address) {
  try {
    return ["http:", "https:", "mailto:"].includes(new URL(address).protocol);
  } catch {
    return false;
  }
}

function link(address, kids) {
  return h("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow", title: address }, kids);
}

/** A run of * or _ or ~~ as { run, count, opens, closes }. */
function readRun(rest, source, at) {
  const mark = rest[0];
  const run = new RegExp(`^\\${mark}+`).exec(rest)[0];
  const before = [...source.slice(Math.max(0, at - 2), at)].at(-1) || " ";
  const after = [...source.slice(at + run.length, at + run.length + 2)][0] || " ";
  const free = (c) => /\s/.test(c) || CJK.test(c);
  const sign = (c) => /[\p{P}\p{S}]/u.test(c);
  const left = !/\s/.test(after) && (!sign(after) || free(before) || sign(before));
  const right = !/\s/.test(before) && (!sign(before) || free(after) || sign(after));
  const inWord = mark === "_";
  const opens = left && (!inWord || !right || sign(before));
  const closes = right && (!inWord || !left || sign(after));
  return [{ run: mark, count: run.length, opens, closes }, run.length];
}

const isRun = (piece) => typeof piece === "object" && piece.run !== undefined;

/** Pairs delimiter runs, innermost first, into em, strong and del. */
function emphasise(pieces) {
  for (let close = 0; close < pieces.length; close += 1) {
    const closer = pieces[close];
    if (!isRun(closer) || !closer.closes || !closer.count) continue;
    const open = opener(pieces, close);
    if (open < 0) continue;
    const use = closer.run === "~" ? 2 : Math.min(2, closer.count, pieces[open].count);
    const tag = closer.run === "~" ? "del" : use === 2 ? "strong" : "em";
    const inner = pieces.slice(open + 1, close).map(shown);
    pieces[open].count -= use;
    closer.count -= use;
    pieces.splice(open + 1, close - open - 1, h(tag, {}, inner));
    close = open + (closer.count ? 1 : 2); // the closer stands two after the opener now; it may close another
  }
  return pieces.map(shown);
}

function opener(pieces, close) {
  const closer = pieces[close];
  for (let at = close - 1; at >= Math.max(0, close - 400); at -= 1) {
    const piece = pieces[at];
    if (!isRun(piece) || piece.run !== closer.run || !piece.opens || !piece.count) continue;
    const mixed = (piece.closes || closer.opens) && (piece.count + closer.count) % 3 === 0 && piece.count % 3 !== 0;
    if (!mixed) return at;
  }
  return -1;
}

const shown = (piece) => (isRun(piece) ? piece.run.repeat(piece.count) : piece);
