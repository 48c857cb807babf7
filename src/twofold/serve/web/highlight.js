// Colours code a little: comments, strings, numbers, keywords, and names that are called. One reader for all
// languages, told apart only by how comments look; what it does not know stays plain. Makes nodes, never HTML.

import { h } from "./dom.js";

const HASH = new Set(
  "bash dockerfile elixir ini julia make makefile nix perl ps1 py python r rb ruby sh shell toml yaml yml zsh".split(
    " ",
  ),
);
const DASH = new Set("haskell hs lua sql".split(" "));
const NONE = new Set(["", "text", "txt", "plain", "plaintext", "markdown", "md", "output", "console"]);
const MARKUP = new Set(["html", "xml", "svg", "vue"]);

const KEYWORDS = new Set(
  `abstract and as assert async await begin bool boolean break byte case catch char class const continue def default del
  delete do double elif else elsif end enum except export extends extern false False final finally float fn for from
  func function global go goto if impl implements import in include instanceof int interface is lambda let local long
  loop match mod module mut namespace new nil None nonlocal not null nullptr of operator or package pass private
  protected pub public raise readonly return select self short signed sizeof static string struct super switch template
  then this throw throws trait true True try type typedef typeof undefined union unless unsafe unsigned until use using
  val var void volatile when where while with yield SELECT FROM WHERE INSERT UPDATE DELETE CREATE TABLE JOIN LEFT INNER
  ON GROUP BY ORDER LIMIT VALUES INTO SET AND OR NOT NULL AS echo fi esac done`.split(/\s+/),
);

const STRING =
  String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'|` +
  "`(?:[^`\\\\]|\\\\.)*`?";
const NUMBER = String.raw`\b(?:0[xX][\da-fA-F_]+|0[bB][01_]+|\d[\d_]*(?:\.\d+)?(?:[eE][+-]?\d+)?)\b`;
const WORD = String.raw`[\p{L}_$][\p{L}\p{N}_$]*`;

const PATTERNS = new Map();

function pattern(language) {
  const comment = HASH.has(language)
    ? "#.*"
    : DASH.has(language)
      ? String.raw`--.*`
      : MARKUP.has(language)
        ? String.raw`<!--[\s\S]*?(?:-->|$)`
        : String.raw`\/\/.*|\/\*[\s\S]*?(?:\*\/|$)`;
  if (!PATTERNS.has(comment)) {
    PATTERNS.set(
      comment,
      new RegExp(`(?<comment>${comment})|(?<string>${STRING})|(?<number>${NUMBER})|(?<word>${WORD})`, "gu"),
    );
  }
  return PATTERNS.get(comment);
}

/** The nodes of a piece of code. */
export function highlight(code, language) {
  const kind = language.toLowerCase();
  if (NONE.has(kind) || code.length > 50_000) return [code];
  const nodes = [];
  let done = 0;
  for (const found of code.matchAll(pattern(kind))) {
    const name = nameOf(found, code);
    if (!name) continue;
    nodes.push(code.slice(done, found.index), h(`span.hl-${name}`, {}, found[0]));
    done = found.index + found[0].length;
  }
  return [...nodes, code.slice(done)];
}

function nameOf(found, code) {
  const { comment, string, number, word } = found.groups;
  if (comment) return "comment";
  if (string) return "string";
  if (number) return "number";
  if (KEYWORDS.has(word)) return "keyword";
  return code[found.index + word.length] === "(" ? "call" : "";
}
