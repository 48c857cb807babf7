// TeX formulas to MathML, which browsers draw themselves: what models write in answers, not a TeX. A command that is
// not known, or a formula that does not close, is shown as its source instead of a guess. Elements are made one by one
// from the names in this file and their text is text, so a formula cannot carry markup, links or styles.
// (Own code rather than a vendored converter: the one that was considered is 170 KB minified, this is 20 KB to read.)

import { h } from "./dom.js";
import { ACCENTS, FUNCTIONS, LARGE, LETTERS, OPERATORS, SPACES, fontOf, inAlphabet } from "./texsymbols.js";

const MATHML = "http://www.w3.org/1998/Math/MathML";
const MAX_DEPTH = 60;
const MAX_CHARS = 20_000;

/** A formula as an element: MathML, or its source where it cannot be read. */
export function maths(source, display) {
  try {
    const math = m("math", { display: display ? "block" : "inline" }, whole(source));
    math.setAttribute("aria-label", source.trim());
    return math;
  } catch (error) {
    if (!(error instanceof TexError || error instanceof RangeError)) throw error; // RangeError: nested beyond the stack
    return h("code.math-source", { title: error.message }, source.trim());
  }
}

class TexError extends Error {}

function whole(source) {
  const reader = new Reader(source);
  return reader.row(() => reader.at >= reader.source.length);
}

function m(tag, attributes, ...kids) {
  const element = document.createElementNS(MATHML, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...kids.flat());
  return element;
}

const row = (nodes) => (nodes.length === 1 ? nodes[0] : m("mrow", {}, nodes));
const mo = (sign, attributes = {}) => m("mo", attributes, sign);
const fence = (sign) => mo(sign, { stretchy: "false" });

/** Reads a formula from left to right; each method returns the node of what it read. */
class Reader {
  constructor(source) {
    if (source.length > MAX_CHARS) throw new TexError("too long");
    this.source = source.replace(/(?<!\\)%.*$/gm, "");
    this.at = 0;
    this.depth = 0;
    this.font = "italic";
  }

  space() {
    while (/\s/.test(this.source[this.at] || "")) this.at += 1;
  }

  /** Is `text` next? Then it is read. */
  eat(text) {
    if (!this.source.startsWith(text, this.at)) return false;
    this.at += text.length;
    return true;
  }

  /** The nodes until `ends()`; \over splits them into a fraction. */
  row(ends) {
    if ((this.depth += 1) > MAX_DEPTH) throw new TexError("nested too deeply");
    const font = this.font;
    const nodes = [];
    for (this.space(); !ends(); this.space()) {
      if (this.at >= this.source.length) throw new TexError("the formula does not close");
      if (this.command("over")) {
        const below = this.row(ends);
        this.leave(font);
        return [m("mfrac", {}, m("mrow", {}, nodes), m("mrow", {}, below))];
      }
      const node = this.scripted();
      if (node) nodes.push(node);
    }
    this.leave(font);
    return nodes;
  }

  leave(font) {
    this.depth -= 1;
    this.font = font;
  }

  /** Is the command `name` next? Then it is read. */
  command(name) {
    const found = new RegExp(`^\\\\${name}(?![a-zA-Z])`).exec(this.source.slice(this.at, this.at + name.length + 2));
    if (found) this.at += found[0].length;
    return found !== null;
  }

  /** An atom with what hangs on it: ^, _, primes, \limits. */
  scripted() {
    let base = this.atom();
    let [under, over, primes, limits] = [null, null, "", base?.limits];
    for (;;) {
      this.space();
      if (this.command("limits")) limits = "always";
      else if (this.command("nolimits")) limits = false;
      else if (this.eat("'")) primes += "′";
      else if (!over && this.eat("^")) over = this.argument();
      else if (!under && this.eat("_")) under = this.argument();
      else break;
    }
    if (primes) over = over ? m("mrow", {}, mo(primes), over) : mo(primes);
    if (!under && !over) return base;
    base ??= m("mrow", {});
    const [below, above, both] = limits ? ["munder", "mover", "munderover"] : ["msub", "msup", "msubsup"];
    if (limits === "always" && base.localName === "mo") base.setAttribute("movablelimits", "false");
    if (!over) return m(below, {}, base, under);
    return under ? m(both, {}, base, under, over) : m(above, {}, base, over);
  }

  /** One thing: a letter, a number, a group, a command. Null for what leaves no mark. */
  atom() {
    const rest = this.source.slice(this.at);
    if (rest[0] === "{") return this.group();
    if (rest[0] === "\\") return this.named();
    if (rest[0] === "^" || rest[0] === "_") return null;
    if ("}&".includes(rest[0])) throw new TexError(`a ${rest[0]} too many`);
    const digits = /^\d+(?:\.\d+|,\d{3}(?!\d))*/.exec(rest);
    if (digits) {
      this.at += digits[0].length;
      return m("mn", {}, [...digits[0]].map((digit) => inAlphabet(this.font, digit)).join(""));
    }
    const sign = String.fromCodePoint(rest.codePointAt(0));
    this.at += sign.length;
    if (sign === "~") return m("mspace", { width: SPACES.get("~") });
    return /[\p{L}]/u.test(sign) ? this.letter(sign) : plainSign(sign);
  }

  letter(sign) {
    if (/[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Hangul}]/u.test(sign))
      return m("mtext", {}, sign);
    const upright = this.font === "upright" ? { mathvariant: "normal" } : {};
    return m("mi", upright, inAlphabet(this.font, sign));
  }

  group() {
    this.at += 1;
    const nodes = this.row(() => this.source[this.at] === "}");
    this.at += 1;
    return row(nodes);
  }

  /** What a command or a script takes: a group, or one atom. */
  argument() {
    this.space();
    if (this.at >= this.source.length) throw new TexError("something is missing at the end");
    if (/\d/.test(this.source[this.at])) return m("mn", {}, inAlphabet(this.font, this.source[this.at++])); // x^12 is x¹2
    return this.atom() ?? m("mrow", {});
  }

  /** The text of a braced argument, unread. */
  raw() {
    this.space();
    if (!this.eat("{")) throw new TexError("a brace is missing");
    let depth = 1;
    const from = this.at;
    for (; depth; this.at += 1) {
      const sign = this.source[this.at];
      if (sign === undefined) throw new TexError("a brace does not close");
      if (sign === "\\") this.at += 1;
      else depth += sign === "{" ? 1 : sign === "}" ? -1 : 0;
    }
    return this.source.slice(from, this.at - 1);
  }

  named() {
    const [all, name] = /^\\([a-zA-Z]+\*?|[\s\S]?)/.exec(this.source.slice(this.at));
    this.at += all.length;
    const special = Object.hasOwn(COMMANDS, name) && COMMANDS[name];
    if (special) return special(this, name);
    const font = fontOf(name);
    if (font) return this.inFont(font);
    if (LETTERS.has(name))
      return m("mi", /[A-Z]/.test(name) ? { mathvariant: "normal" } : {}, inAlphabet(this.font, LETTERS.get(name)));
    if (OPERATORS.has(name)) return operator(OPERATORS.get(name));
    if (SPACES.has(name)) return m("mspace", { width: SPACES.get(name) });
    if (LARGE.has(name)) return large(...LARGE.get(name));
    if (FUNCTIONS.has(name)) return upright(name, FUNCTIONS.get(name));
    if (ACCENTS.has(name)) return accent(this, ...ACCENTS.get(name));
    if ("{}[]|$%#&_".includes(name) && name)
      return name === "|" ? fence("‖") : "$%#_&".includes(name) ? m("mtext", {}, name) : fence(name);
    throw new TexError(`\\${name} is not known`);
  }

  inFont(font) {
    const before = this.font;
    this.font = font;
    const node = this.argument();
    this.font = before;
    return node;
  }

  /** A bracket after \left, \right, \big and so on; "" for the empty one. */
  delimiter() {
    this.space();
    const [all, name, sign] = /^(?:\\([a-zA-Z]+|[{}|])|(.))/u.exec(this.source.slice(this.at)) || [];
    if (all === undefined) throw new TexError("a bracket is missing");
    this.at += all.length;
    if (name === "|") return "‖";
    const known =
      name === undefined
        ? ({ ".": "", "<": "⟨", ">": "⟩" }[sign] ?? sign)
        : (OPERATORS.get(name) ?? ("{}".includes(name) ? name : null));
    if (known === null) throw new TexError(`\\${name} is no bracket`);
    return known;
  }
}

function plainSign(sign) {
  const better = { "-": "−", "*": "∗", "`": "‘" }[sign] || sign;
  return "()[]|/".includes(sign) ? fence(better) : mo(better);
}

function operator(sign) {
  return /[|‖⟨⟩⌊⌋⌈⌉{}[\]]/.test(sign) ? fence(sign) : mo(sign);
}

function large(sign, limits) {
  return Object.assign(mo(sign, limits ? { movablelimits: "true", largeop: "true" } : { largeop: "true" }), { limits });
}

function upright(name, limits) {
  const text = name.replace(/^(lim)(sup|inf)$/, "$1 $2").replace(/^arg(max|min)$/, "arg $1");
  return Object.assign(
    mo(text, limits ? { movablelimits: "true", class: "tex-function" } : { class: "tex-function" }),
    { limits },
  );
}

function accent(reader, sign, below, stretches) {
  const mark = mo(sign, { stretchy: String(stretches) });
  const node = below
    ? m("munder", { accentunder: "true" }, reader.argument(), mark)
    : m("mover", { accent: "true" }, reader.argument(), mark);
  return Object.assign(node, { limits: "⏞⏟".includes(sign) });
}

function fraction(reader, name) {
  const parts = [reader.argument(), reader.argument()];
  if (name === "binom") return m("mrow", {}, mo("("), m("mfrac", { linethickness: "0" }, parts), mo(")"));
  const node = m("mfrac", {}, parts);
  return name === "dfrac" || name === "cfrac" ? m("mstyle", { displaystyle: "true", scriptlevel: "0" }, node) : node;
}

function root(reader) {
  reader.space();
  if (!reader.eat("[")) return m("msqrt", {}, reader.argument());
  const index = reader.row(() => reader.source[reader.at] === "]");
  reader.at += 1;
  return m("mroot", {}, reader.argument(), row(index));
}

function textNode(reader, name) {
  const kind = { textbf: "tex-bold", textit: "tex-italic", texttt: "tex-mono" }[name];
  const pieces = reader.raw().split(/\$([^$]*)\$/);
  const nodes = pieces.map((piece, index) => {
    if (index % 2) return row(whole(piece));
    return m("mtext", kind ? { class: kind } : {}, piece.replace(/\\([{}$%#_& ])/g, "$1").replace(/^ | $/g, "\u00a0"));
  });
  return row(nodes);
}

function leftRight(reader) {
  const nodes = [mo(reader.delimiter(), { stretchy: "true", symmetric: "true", form: "prefix" })];
  for (;;) {
    nodes.push(
      ...reader.row(() => /^\\(?:right|middle)(?![a-zA-Z])/.test(reader.source.slice(reader.at, reader.at + 9))),
    );
    const middle = reader.command("middle");
    if (!middle) reader.command("right");
    nodes.push(mo(reader.delimiter(), { stretchy: "true", symmetric: "true", form: middle ? "infix" : "postfix" }));
    if (!middle) return m("mrow", {}, nodes);
  }
}

function sized(reader, name) {
  const size = { b: "1.2em", B: "1.8em" }[name[0]] || "1.2em";
  const scale = name.startsWith("bigg") ? "2.4em" : name.startsWith("Bigg") ? "3em" : size;
  return mo(reader.delimiter(), { stretchy: "true", symmetric: "true", minsize: scale, maxsize: scale });
}

const TABLES = {
  matrix: ["", ""],
  pmatrix: ["(", ")"],
  bmatrix: ["[", "]"],
  Bmatrix: ["{", "}"],
  vmatrix: ["|", "|"],
  Vmatrix: ["‖", "‖"],
  smallmatrix: ["", ""],
  cases: ["{", ""],
  rcases: ["", "}"],
  array: ["", ""],
  aligned: ["", ""],
  align: ["", ""],
  alignat: ["", ""],
  split: ["", ""],
  gathered: ["", ""],
  gather: ["", ""],
  equation: ["", ""],
  multline: ["", ""],
};

function environment(reader) {
  const full = reader.raw();
  const name = full.replace(/\*$/, "");
  if (!Object.hasOwn(TABLES, name)) throw new TexError(`the environment ${full} is not known`);
  if (name === "array" || name === "alignat") reader.raw();
  const rows = [[]];
  const ending = `\\end{${full}}`;
  const stops = () =>
    /^(?:&|\\\\|\\cr(?![a-zA-Z])|\\end(?![a-zA-Z]))/.test(reader.source.slice(reader.at, reader.at + 5));
  for (;;) {
    rows.at(-1).push(m("mtd", {}, reader.row(stops)));
    if (reader.eat(ending)) break;
    if (reader.eat("&")) continue;
    if (!reader.eat("\\\\") && !reader.command("cr")) throw new TexError(`${ending} is missing`);
    const gap = /^\s*\[[\d.]+\s*[a-z]{2}\]/.exec(reader.source.slice(reader.at));
    if (gap) reader.at += gap[0].length;
    while ((reader.space(), reader.command("hline"))) continue;
    rows.push([]);
  }
  if (rows.length > 1 && rows.at(-1).length === 1 && !rows.at(-1)[0].hasChildNodes()) rows.pop();
  const kind = /align|split/.test(name) ? "tex-aligned" : /cases/.test(name) ? "tex-cases" : "tex-matrix";
  const wide = /matrix|array/.test(name) ? {} : { displaystyle: "true" };
  const table = m(
    "mtable",
    { class: kind, ...wide },
    rows.map((cells) => m("mtr", {}, cells)),
  );
  const [open, close] = TABLES[name];
  const bracket = (sign, form) => (sign ? [mo(sign, { stretchy: "true", symmetric: "true", form })] : []);
  return m("mrow", {}, bracket(open, "prefix"), table, bracket(close, "postfix"));
}

function stacked(reader, name) {
  const first = reader.argument();
  const second = reader.argument();
  return m(name === "underset" ? "munder" : "mover", {}, second, first);
}

function arrow(reader, name) {
  reader.space();
  let below = null;
  if (reader.eat("[")) {
    below = row(reader.row(() => reader.source[reader.at] === "]"));
    reader.at += 1;
  }
  const sign = mo(name.startsWith("xleft") ? "←" : "→", { stretchy: "true", minsize: "2em" });
  const above = m("mpadded", { width: "+0.8em", lspace: "0.4em" }, reader.argument());
  return below ? m("munderover", {}, sign, below, above) : m("mover", {}, sign, above);
}

function struck(reader) {
  const node = reader.argument();
  const strike = new Map([
    ["=", "≠"],
    ["∈", "∉"],
    ["≡", "≢"],
    ["⊂", "⊄"],
    ["∃", "∄"],
    ["∣", "∤"],
  ]);
  const sign = node.textContent;
  return mo(strike.get(sign) || `${sign}\u0338`);
}

const ignored = () => null;
const skipArgument = (reader) => (reader.raw(), null);
const keepBody = (reader) => reader.argument();
const boxed = (reader) => m("mrow", { class: "tex-boxed" }, reader.argument());
const modulo = (reader, name) => {
  if (name === "bmod") return m("mo", { lspace: "0.22em", rspace: "0.22em" }, "mod");
  return m(
    "mrow",
    {},
    m("mspace", { width: "0.5em" }),
    fence("("),
    m("mi", { mathvariant: "normal" }, "mod"),
    m("mspace", { width: "0.3em" }),
    reader.argument(),
    fence(")"),
  );
};

const COMMANDS = {
  ...Object.fromEntries(["frac", "dfrac", "tfrac", "cfrac", "binom"].map((name) => [name, fraction])),
  ...Object.fromEntries(
    ["text", "textrm", "textbf", "textit", "texttt", "textnormal", "mbox", "hbox"].map((name) => [name, textNode]),
  ),
  ...Object.fromEntries(
    "big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr bigm Bigm".split(" ").map((name) => [name, sized]),
  ),
  ...Object.fromEntries(
    "displaystyle textstyle scriptstyle nonumber notag small normalsize rm it bf"
      .split(" ")
      .map((name) => [name, ignored]),
  ),
  ...Object.fromEntries("label color hspace vspace".split(" ").map((name) => [name, skipArgument])),
  sqrt: root,
  left: leftRight,
  begin: environment,
  overset: stacked,
  underset: stacked,
  stackrel: stacked,
  xrightarrow: arrow,
  xleftarrow: arrow,
  not: struck,
  overline: (reader) => m("mrow", { class: "tex-over" }, reader.argument()),
  underline: (reader) => m("mrow", { class: "tex-under" }, reader.argument()),
  boxed,
  fbox: boxed,
  cancel: (reader) => m("mrow", { class: "tex-struck" }, reader.argument()),
  bmod: modulo,
  pmod: modulo,
  mod: modulo,
  phantom: (reader) => m("mphantom", {}, reader.argument()),
  operatorname: (reader) => upright(reader.raw(), false),
  "operatorname*": (reader) => upright(reader.raw(), true),
  textcolor: (reader) => (reader.raw(), reader.argument()),
  tag: (reader) => m("mtext", {}, `\u2003(${reader.raw()})`),
  substack: (reader) => new Reader(`\\begin{matrix}${reader.raw()}\\end{matrix}`).atom(),
  mathop: keepBody,
  mathrel: keepBody,
  mathbin: keepBody,
  mathord: keepBody,
  middle: (reader) => mo(reader.delimiter()),
  "\\": () => m("mspace", { linebreak: "newline" }),
};
