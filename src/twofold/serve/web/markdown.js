// Markdown as models write it, made straight into elements: headings, lists, task lists, quotes, tables, code, maths.
// Safe by construction: the source only ever becomes text nodes inside elements named here, HTML in it stays text, and
// images are shown as links, since loading one would tell its server that the answer was read. While a reply streams,
// blocks whose source has not changed keep their elements, so that a selection or a scrolled code block stays put.

import { h, iconButton, toast } from "./dom.js";
import { highlight } from "./highlight.js";
import { t } from "./i18n.js";
import { inline } from "./inline.js";
import { maths } from "./tex.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:\s+(.*?))?(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}(?:(?:\*\s*){3,}|(?:-\s*){3,}|(?:_\s*){3,})$/;
const ITEM = /^( {0,8})([-*+]|\d{1,9}[.)])(?:( +)(.*)|\s*)$/;
const QUOTE = /^ {0,3}> ?/;
const MATH_OPEN = /^ {0,3}(\$\$|\\\[|\\begin\{(?:align|gather|equation|multline|cases|[pbBvV]?matrix)(?:ed|at)?\*?\})/;
const TABLE_RULE = /^ {0,3}\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;

/** Shows `source` in `element`, reusing the elements of blocks that are the same as before. */
export function showMarkdown(element, source) {
  const blocks = parseBlocks(source.replace(/\r\n?/g, "\n").split("\n"));
  const before = element.blocks || [];
  const after = blocks.map((block, index) => {
    const key = JSON.stringify(block);
    return before[index]?.key === key ? before[index] : { key, node: blockNode(block) };
  });
  after.forEach(({ node }, index) => {
    const there = element.childNodes[index];
    if (there === node) return;
    if (there) element.replaceChild(node, there);
    else element.append(node);
  });
  while (element.childNodes.length > after.length) element.lastChild.remove();
  element.blocks = after;
}

/** Lines to blocks, plain objects with a `type`. */
export function parseBlocks(lines, depth = 0) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) at += 1;
    else {
      const [block, next] = readBlock(lines, at, depth);
      blocks.push(block);
      at = next;
    }
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const heading = HEADING.exec(line);
  if (FENCE.test(line)) return readFence(lines, at);
  if (MATH_OPEN.test(line)) return readMath(lines, at) || readParagraph(lines, at);
  if (heading) return [{ type: "heading", level: heading[1].length, text: heading[2] || "" }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < 8 && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < 8 && ITEM.test(line)) return readList(lines, at, depth);
  if (line.includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1]) && lines[at + 1].includes("-")) {
    const table = readTable(lines, at);
    if (table) return table;
  }
  return readParagraph(lines, at);
}

function readFence(lines, at) {
  const [, fence, info] = FENCE.exec(lines[at]);
  const indent = lines[at].search(/\S/);
  const close = new RegExp(`^ {0,3}\\${fence[0]}{${fence.length},}\\s*$`);
  const code = [];
  for (at += 1; at < lines.length && !close.test(lines[at]); at += 1) {
    code.push(lines[at].slice(Math.min(indent, Math.max(lines[at].search(/\S/), 0))));
  }
  return [
    { type: "code", language: info.trim().split(/\s/)[0], text: code.join("\n"), open: at >= lines.length },
    at + 1,
  ];
}

function readMath(lines, at) {
  const open = MATH_OPEN.exec(lines[at])[1];
  const named = open.startsWith("\\begin"); // an environment on its own is maths too, its name included
  const close = named ? open.replace("begin", "end") : open === "$$" ? "$$" : "\\]";
  const text = [];
  let rest = lines[at].trimStart().slice(named ? 0 : 2);
  for (;;) {
    const end = rest.indexOf(close);
    if (end >= 0) {
      const after = rest.slice(end + close.length);
      if (after.replace(/^[.,;:。，；]/, "").trim()) return null; // text goes on after it: inline maths
      text.push(rest.slice(0, named ? end + close.length : end));
      return [{ type: "math", text: text.join("\n"), after: after.trim() }, at + 1];
    }
    text.push(rest);
    at += 1;
    if (at >= lines.length) return [{ type: "math", text: text.join("\n"), after: "", open: true }, at];
    rest = lines[at];
  }
}

function readQuote(lines, at, depth) {
  const inner = [];
  for (; at < lines.length && lines[at].trim() && (QUOTE.test(lines[at]) || !startsBlock(lines[at])); at += 1) {
    inner.push(lines[at].replace(QUOTE, ""));
  }
  return [{ type: "quote", blocks: parseBlocks(inner, depth + 1) }, at];
}

function readList(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const ordered = /\d/.test(first[2]);
  const list = { type: "list", ordered, start: ordered ? Number.parseInt(first[2], 10) : 1, items: [], loose: false };
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || /\d/.test(item[2]) !== ordered || RULE.test(lines[at]) || item[1].length > first[1].length + 3) break;
    const [inner, next] = itemLines(lines, at, item);
    const task = /^\[([ xX])\]\s+/.exec(inner[0]);
    if (task) inner[0] = inner[0].slice(task[0].length);
    if (inner.slice(0, -1).some((line) => !line.trim())) list.loose = true;
    list.items.push({ task: task ? task[1] !== " " : null, blocks: parseBlocks(inner, depth + 1) });
    at = next;
  }
  return [list, at];
}

/** The lines of one item without their indent, and the line after it. */
function itemLines(lines, at, item) {
  const indent = item[1].length + item[2].length + Math.min((item[3] || " ").length, 4);
  const inner = [item[4] || ""];
  for (at += 1; at < lines.length; at += 1) {
    const line = lines[at];
    const depth = line.search(/\S/);
    if (depth < 0) {
      const next = lines.slice(at).find((other) => other.trim());
      if (!next || (next.search(/\S/) < Math.min(indent, item[1].length + 2) && !sameList(next, item))) break;
      inner.push("");
    } else if (depth >= Math.min(indent, item[1].length + 2)) inner.push(line.slice(Math.min(depth, indent)));
    else if (inner.at(-1) !== "" && !startsBlock(line)) inner.push(line.trim());
    else break;
  }
  return [inner, at];
}

function sameList(line, item) {
  const other = ITEM.exec(line);
  return other !== null && /\d/.test(other[2]) === /\d/.test(item[2]);
}

function readTable(lines, at) {
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((rule) =>
    /^:-+:$/.test(rule) ? "center" : rule.endsWith(":") ? "right" : "left",
  );
  if (head.length !== align.length) return null;
  const rows = [];
  for (at += 2; at < lines.length && lines[at].includes("|"); at += 1) {
    const row = cells(lines[at]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return [{ type: "table", head, align, rows }, at];
}

/** The cells of a row; a bar after a backslash or inside a code span does not divide. */
function cells(line) {
  const found = [""];
  const inner = line
    .trim()
    .replace(/^\|/, "")
    .replace(/([^\\])\|$/, "$1");
  for (const [piece] of inner.matchAll(/\\\||`[^`]*`|\||[^|`\\]+|[\s\S]/g)) {
    if (piece === "|") found.push("");
    else found[found.length - 1] += piece === "\\|" ? "|" : piece;
  }
  return found.map((cell) => cell.trim());
}

function startsBlock(line) {
  return [FENCE, HEADING, RULE, ITEM, QUOTE, MATH_OPEN].some((pattern) => pattern.test(line));
}

function readParagraph(lines, at) {
  const text = [lines[at].trim()];
  for (at += 1; at < lines.length && lines[at].trim() && !startsBlock(lines[at]); at += 1) {
    if (lines[at].includes("|") && at + 1 < lines.length && TABLE_RULE.test(lines[at + 1])) break;
    text.push(lines[at].replace(/^\s+/, "").replace(/\s+$/, ""));
  }
  return [{ type: "paragraph", text: text.join("\n") }, at];
}

const MAKERS = {
  heading: ({ level, text }) => h(`h${Math.min(level + 2, 6)}.md-h${Math.min(level, 4)}`, {}, inline(text)),
  paragraph: ({ text }) => h("p", {}, inline(text)),
  rule: () => h("hr"),
  quote: ({ blocks }) => h("blockquote", {}, blocks.map(blockNode)),
  math: ({ text, after, open }) =>
    h("div.math-block", { tabIndex: 0 }, open ? h("code.math-source", {}, text.trim()) : maths(text, true), after),
  list: listNode,
  table: tableNode,
  code: codeNode,
};

function blockNode(block) {
  return MAKERS[block.type](block);
}

function listNode({ ordered, start, items, loose }) {
  return h(
    `${ordered ? "ol" : "ul"}${loose ? ".loose" : ""}`,
    ordered ? { start } : {},
    items.map(({ task, blocks }) =>
      h(
        task === null ? "li" : "li.task",
        {},
        task !== null && h("input", { type: "checkbox", checked: task, disabled: true }),
        blocks.map((block) =>
          block.type === "paragraph" && !loose ? h("span", {}, inline(block.text)) : blockNode(block),
        ),
      ),
    ),
  );
}

function tableNode({ head, align, rows }) {
  const cell = (tag) => (text, column) => h(`${tag}.${align[column]}`, {}, inline(text));
  return h(
    "div.table-frame",
    { tabIndex: 0 },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, head.map(cell("th")))),
      h(
        "tbody",
        {},
        rows.map((row) => h("tr", {}, row.map(cell("td")))),
      ),
    ),
  );
}

function codeNode({ language, text }) {
  return h(
    "figure.code",
    {},
    h(
      "figcaption",
      {},
      h("span", {}, language),
      iconButton("copy", t("copy_code"), () => copyText(text)),
    ),
    h("pre", { tabIndex: 0 }, h("code", {}, highlight(text, language))),
  );
}

/** Puts text on the clipboard and says whether that worked. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    toast(t("copied"));
  } catch {
    toast(t("copy_failed"));
  }
}
