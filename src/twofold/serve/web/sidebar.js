// The list of conversations: open, rename, export, delete with undo, import. On a narrow screen it lies over the page.

import { fill, h, icon, iconButton, mark } from "./dom.js";
import { day, t } from "./i18n.js";

/** The name a conversation is listed under. */
export function titleOf(conversation) {
  return conversation.title || t("untitled");
}

/** Offers a file for download. */
export function download(name, text) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/**
 * The sidebar. `act`: create(), open(id), rename(id, title), remove(id), exportOne(id), exportAll(), importFile(file),
 * close(). update({ conversations, current, running }) shows the list; `running` is a set of ids.
 */
export function sidebarView(act) {
  const list = h("ul.chat-list");
  const file = h("input.unseen", {
    type: "file",
    accept: ".json,application/json",
    tabIndex: -1,
    aria: { hidden: "true" },
  });
  file.addEventListener("change", () => {
    if (file.files[0]) act.importFile(file.files[0]);
    file.value = "";
  });
  const element = h(
    "nav.sidebar",
    { id: "sidebar", aria: { label: t("conversations") } },
    h(
      "header",
      {},
      mark(),
      h("b", {}, "Twofold"),
      iconButton("close", t("close"), act.close, { className: "icon-button only-narrow" }),
    ),
    h("button.new-chat", { type: "button", onclick: act.create }, icon("plus"), t("new_chat")),
    list,
    h(
      "footer",
      {},
      h("button.text-button.quiet", { type: "button", onclick: () => file.click() }, icon("load"), t("import")),
      h("button.text-button.quiet", { type: "button", onclick: act.exportAll }, icon("save"), t("export_all")),
      file,
    ),
  );
  let renaming = null;
  let shown = {};

  function update(next) {
    shown = next;
    if (renaming && document.activeElement === list.querySelector("input")) return; // a name is being typed
    fill(list, next.conversations.length ? next.conversations.map(entry) : h("li.hint", {}, t("no_chats")));
  }

  function entry(conversation) {
    const { id } = conversation;
    const current = id === shown.current;
    if (renaming === id) return h("li", {}, renameField(conversation));
    return h(
      "li",
      { data: { id, current } },
      h(
        "button.chat-name",
        { type: "button", onclick: () => act.open(id), aria: current ? { current: "true" } : {} },
        h("span", {}, titleOf(conversation)),
        h("small", {}, shown.running.has(id) ? t("working") : day(conversation.updated)),
      ),
      h(
        "span.chat-tools",
        {},
        iconButton(
          "pencil",
          t("rename"),
          () => ((renaming = id), update(shown), list.querySelector("input")?.select()),
        ),
        iconButton("save", t("export_one"), () => act.exportOne(id)),
        iconButton("trash", t("remove"), () => act.remove(id)),
      ),
    );
  }

  function renameField(conversation) {
    const leave = (keep) => {
      if (renaming !== conversation.id) return;
      renaming = null;
      if (keep) act.rename(conversation.id, field.value.trim());
      else update(shown);
    };
    const field = h("input", {
      type: "text",
      value: titleOf(conversation),
      maxLength: 200,
      aria: { label: t("title") },
      onkeydown: (event) => {
        if (event.isComposing) return;
        if (event.key === "Enter") leave(true);
        if (event.key === "Escape") (event.stopPropagation(), leave(false));
      },
      onblur: () => leave(true),
    });
    return field;
  }

  return { element, update };
}
