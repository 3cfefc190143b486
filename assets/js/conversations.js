// The list in the sidebar: find, open, rename, delete, export, import.

import { byId, el, iconButton, saveFile } from "./dom.js";
import { t } from "./texts.js";

export class Conversations {
  constructor(chat, store, open) {
    this.chat = chat;
    this.store = store;
    this.open = open;
    this.query = "";
  }

  draw() {
    const search = el("input", { type: "search", id: "find", value: this.query,
      placeholder: t("find"), aria: { label: t("find") } });
    search.addEventListener("input", () => {
      this.query = search.value;
      this.list();
    });
    const file = el("input", { type: "file", accept: ".json,application/json", hidden: true });
    file.addEventListener("change", () => this.#import(file));
    byId("panel-chats").replaceChildren(
      search,
      el("ul", { id: "chat-list" }),
      el("div", { className: "row" },
        el("button", { type: "button", on: { click: () => this.#export() } }, t("export_all")),
        el("button", { type: "button", on: { click: () => file.click() } }, t("import")), file),
      el("p", { className: "quiet", id: "chats-note", role: "status" },
        t(this.store.isLasting ? "chats_kept" : "chats_not_kept")),
    );
    return this.list();
  }

  async list() {
    const place = byId("chat-list");
    if (!place) return;
    const wanted = this.query.trim().toLowerCase();
    const all = await this.store.list();
    const found = all.filter((c) => !wanted || textOf(c).includes(wanted));
    place.replaceChildren(...found.map((c) => this.#item(c)));
    if (!found.length) place.append(el("li", { className: "quiet" }, t(wanted ? "none_found" : "no_chats")));
  }

  #item(conversation) {
    const title = conversation.title || t("untitled");
    const isCurrent = conversation.id === this.chat.conversation.id;
    const open = el("button", { type: "button", className: "open", title }, title);
    if (isCurrent) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => this.open(conversation.id));
    const item = el("li", {}, open, el("span", { className: "tools" },
      iconButton("edit", t("rename_chat", { title }), () => this.#rename(item, conversation)),
      iconButton("save", t("export_chat", { title }), () => this.#export(conversation)),
      iconButton("trash", t("delete_chat", { title }), () => this.#askDelete(item, conversation))));
    return item;
  }

  #rename(item, conversation) {
    const field = el("input", { value: conversation.title, aria: { label: t("new_name") } });
    const finish = async (keep) => {
      if (keep && field.value.trim()) {
        const fresh = await this.#current(conversation.id);
        fresh.title = field.value.trim();
        await this.store.put(fresh);
      }
      await this.list();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter") finish(true);
      if (event.key === "Escape") {
        event.stopPropagation();
        finish(false);
      }
    });
    field.addEventListener("blur", () => finish(true), { once: true });
    item.replaceChildren(field);
    field.focus();
    field.select();
  }

  // The open conversation is the one in memory; what is in the database may be older.
  async #current(id) {
    return id === this.chat.conversation.id ? this.chat.conversation : this.store.get(id);
  }

  #askDelete(item, conversation) {
    const yes = el("button", { type: "button", className: "small danger" }, t("delete"));
    yes.addEventListener("click", async () => {
      if (this.chat.run?.conversation.id === conversation.id) this.chat.stop();
      await this.store.remove(conversation.id);
      if (conversation.id === this.chat.conversation.id) this.open(null);
      else await this.list();
    });
    const no = el("button", { type: "button", className: "small", on: { click: () => this.list() } },
      t("cancel"));
    item.replaceChildren(el("span", { className: "sure" }, t("delete_sure")), yes, no);
    yes.focus();
  }

  async #export(conversation = null) {
    const text = await this.store.export(conversation ? [conversation.id] : null);
    const day = new Date().toISOString().slice(0, 10);
    saveFile(`${conversation ? (conversation.title || "chat").slice(0, 40) : "chats"}-${day}.json`, text);
  }

  async #import(file) {
    const note = byId("chats-note");
    try {
      const count = await this.store.import(await file.files[0].text());
      note.textContent = t("imported", { count });
    } catch {
      note.textContent = t("import_failed");
    }
    file.value = "";
    await this.list();
  }
}

function textOf(conversation) {
  const texts = Object.values(conversation.nodes).map((node) => node.text);
  return [conversation.title, ...texts].join("\n").toLowerCase();
}
