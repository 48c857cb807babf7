// The calculator that the page can offer as a tool: the same schema and the same answers as the one the models are
// trained with (twofold.tasks.tools), without eval. Numbers are doubles: beyond 2^53 it says so instead of rounding.

export const CALCULATOR = {
  type: "function",
  function: {
    name: "calc",
    description: "Compute.",
    parameters: {
      type: "object",
      properties: { expression: { type: "string" } },
      required: ["expression"],
    },
  },
};

const MAX_CHARS = 200;
const BAD = "error: not an arithmetic expression";
const LARGE = "error: number too large";

/** The result of a call, or null if it is none for the calculator. `source` is the JSON of its arguments. */
export function runCall(name, source) {
  if (name !== CALCULATOR.function.name) return null;
  let given;
  try {
    given = JSON.parse(source);
  } catch {
    return "error: the arguments are not JSON";
  }
  if (!given || Object.keys(given).join() !== "expression") return "error: calc takes one argument, expression";
  if (typeof given.expression !== "string") return "error: expression must be a string";
  return calculate(given.expression);
}

/** Value of an arithmetic expression (+ - * / // %, brackets, signs) as text, or "error: …". */
export function calculate(expression) {
  if (expression.length > MAX_CHARS) return `error: expression is longer than ${MAX_CHARS} characters`;
  const tokens = expression.match(/\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|\/\/|[-+*/%()]|\S/g) || [];
  try {
    const reader = { tokens, at: 0 };
    const value = sum(reader);
    return reader.at < tokens.length ? BAD : shown(value);
  } catch (error) {
    return error instanceof RangeError ? error.message : BAD;
  }
}

function sum(reader) {
  let left = product(reader);
  for (let sign = reader.tokens[reader.at]; sign === "+" || sign === "-"; sign = reader.tokens[reader.at]) {
    reader.at += 1;
    const right = product(reader);
    left = { value: left.value + (sign === "+" ? right.value : -right.value), whole: left.whole && right.whole };
  }
  return left;
}

const OPERATIONS = {
  "*": (a, b) => a * b,
  "/": (a, b) => a / b,
  "//": (a, b) => Math.floor(a / b),
  "%": (a, b) => ((a % b) + b) % b,
};

function product(reader) {
  let left = signed(reader);
  for (let sign = reader.tokens[reader.at]; sign in OPERATIONS; sign = reader.tokens[reader.at]) {
    reader.at += 1;
    const right = signed(reader);
    if (sign !== "*" && right.value === 0) throw new RangeError("error: division by zero");
    const whole = sign !== "/" && left.whole && right.whole;
    left = { value: OPERATIONS[sign](left.value, right.value), whole };
  }
  return left;
}

function signed(reader) {
  const token = reader.tokens[reader.at++];
  if (token === "+") return signed(reader);
  if (token === "-") {
    const { value, whole } = signed(reader);
    return { value: -value, whole };
  }
  if (token === "(") {
    const inner = sum(reader);
    if (reader.tokens[reader.at++] !== ")") throw new SyntaxError("bracket");
    return inner;
  }
  if (!/^[\d.]/.test(token)) throw new SyntaxError("number");
  return { value: Number(token), whole: /^\d+$/.test(token) };
}

function shown({ value, whole }) {
  if (!Number.isFinite(value) || (whole && !Number.isSafeInteger(value))) throw new RangeError(LARGE);
  if (Number.isInteger(value) && Math.abs(value) < 1e15) return String(value === 0 ? 0 : value);
  const [digits, power] = (Math.abs(value) < 1e-4 ? value.toExponential(9) : value.toPrecision(10)).split("e");
  const short = digits.includes(".") ? digits.replace(/\.?0+$/, "") : digits;
  if (power === undefined) return short;
  return `${short}e${power[0]}${power.slice(1).padStart(2, "0")}`;
}
