// Making elements. The page never parses HTML: every node is made here or by the small renderers, and text is always
// a text node, so what a model writes cannot become markup. That also keeps the strict Content-Security-Policy
// (no inline script or style) and Trusted Types satisfied.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element: h("button.ghost", { title: "x", onclick: f, aria: { pressed: "true" } }, "text", child, ...).
 * `spec` is a tag with classes; null and false children are left out; arrays are flattened.
 */
export function h(spec, props, ...kids) {
  const [tag, ...classes] = spec.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(props || {})) setProp(element, name, value);
  append(element, kids);
  return element;
}

function setProp(element, name, value) {
  if (value === undefined || value === null) return;
  if (name === "aria") for (const [key, v] of Object.entries(value)) element.setAttribute(`aria-${key}`, v);
  else if (name === "data") Object.assign(element.dataset, value);
  else if (name === "role" || name === "for" || name === "list") element.setAttribute(name, value);
  else element[name] = value;
}

function append(element, kids) {
  for (const kid of kids.flat(Infinity)) {
    if (kid !== null && kid !== undefined && kid !== false) element.append(kid);
  }
}

/** Replaces what an element holds. */
export function fill(element, ...kids) {
  element.replaceChildren();
  append(element, kids);
  return element;
}

// Strokes on a 24 x 24 grid.
const ICONS = {
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h10",
  sliders: "M4 7h9M19 7h1M4 17h2M12 17h8M16 4.5v5M9 14.5v5",
  close: "M6 6l12 12M18 6L6 18",
  up: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  copy: "M9 9h11v11H9zM15 9V4H4v11h5",
  check: "M5 12.5l4.5 4.5L19 7.5",
  pencil: "M4 20l1-4L16.5 4.5l3 3L8 19z",
  again: "M19.5 9A8 8 0 1 0 20 13M20 4v5h-5",
  left: "M14.5 6l-6 6 6 6",
  right: "M9.5 6l6 6-6 6",
  down: "M6 9.5l6 6 6-6",
  trash: "M5 7h14M10 7V4.5h4V7M7 7l1 13h8l1-13",
  save: "M12 4v11M7 10.5l5 5 5-5M5 20h14",
  load: "M12 16V5M7 9.5l5-5 5 5M5 20h14",
  bars: "M5 20v-6M10 20V9M15 20v-9M20 20V4",
  tool: "M9 4c-3 0-2 3.5-2 5s-1 3-2.5 3C6 12 7 13.5 7 15s-1 5 2 5M15 4c3 0 2 3.5 2 5s1 3 2.5 3c-1.5 0-2.5 1.5-2.5 3s1 5-2 5",
  warn: "M12 4.500L21 20H3zM12 10v5M12 17.500v.1",
  keys: "M3 7h18v10H3zM7 10.500h.1M11 10.500h.1M15 10.500h.1M8 14h8",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8M12 3v1.500M12 19.500V21M3 12h1.500M19.5 12H21M5.6 5.600l1 1M17.4 17.400l1 1M5.6 18.400l1-1M17.4 6.600l1-1",
  moon: "M19.5 14.500A8 8 0 0 1 9.5 4.500a8 8 0 1 0 10 10",
  half: "M12 4a8 8 0 1 0 0 16zM12 4a8 8 0 0 1 0 16",
};

/** A line icon that says nothing to a screen reader. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  for (const [key, value] of [
    ["viewBox", "0 0 24 24"],
    ["class", `icon icon-${name}`],
    ["aria-hidden", "true"],
  ]) {
    svg.setAttribute(key, value);
  }
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** The sign of the two modes: one sheet, folded. */
export function mark() {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 32 32");
  svg.setAttribute("class", "mark");
  svg.setAttribute("aria-hidden", "true");
  for (const [name, d] of [
    ["think", "M4 9.5 16 4v18.5L4 28z"],
    ["direct", "M28 9.5 16 4v18.5L28 28z"],
  ]) {
    const path = document.createElementNS(SVG, "path");
    path.setAttribute("d", d);
    path.setAttribute("class", `mark-${name}`);
    svg.append(path);
  }
  return svg;
}

/** A button that is an icon; its label is read out and shown on hover. */
export function iconButton(name, label, onclick, props = {}) {
  const { aria = {}, ...rest } = props;
  return h(
    "button.icon-button",
    { type: "button", title: label, onclick, aria: { label, ...aria }, ...rest },
    icon(name),
  );
}

/** A row of exclusive choices as native radio buttons: options are [value, label, hint]. */
export function segments(name, label, options, value, onchange) {
  return h(
    "div.segments",
    { role: "radiogroup", aria: { label }, data: { name } },
    options.map(([key, text, hint]) =>
      h(
        "label",
        { title: hint || "" },
        h("input", { type: "radio", name, value: key, checked: key === value, onchange: () => onchange(key) }),
        h("span", {}, text),
      ),
    ),
  );
}

/** Says something to screen readers, once. */
export function announce(text) {
  document.getElementById("status").textContent = text;
}

/** A short note at the bottom, with at most one action; goes by itself. */
export function toast(text, action) {
  const note = h("div.toast", { role: "status" }, h("span", {}, text));
  const leave = () => note.remove();
  if (action) {
    const act = () => (leave(), action.run());
    note.append(h("button.text-button", { type: "button", onclick: act }, action.label));
  }
  document.getElementById("toasts").replaceChildren(note);
  setTimeout(leave, action ? 8000 : 4000);
}
