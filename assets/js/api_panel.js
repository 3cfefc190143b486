// The API panel: key, address, model name, programs to copy. The key is fetched when it is needed,
// shown for half a minute, and never stored, put into an address, or into Gradio's values.
//
// The owner's link carries a token behind its #, which no server or log sees; it is kept for this
// tab and sent as a header.

import { byId, copyText, el, showDone } from "./dom.js";
import { SNIPPETS } from "./snippets.js";
import { t } from "./texts.js";

const MASK = "sk-••••••••••••••••";
const SHOWN_SECONDS = 30;
const TOKEN = "owner-token";

export function takeOwnerToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("owner");
  if (!token) return;
  sessionStorage.setItem(TOKEN, token);
  history.replaceState(null, "", location.pathname + location.search);
}

export function ownerHeaders() {
  const token = sessionStorage.getItem(TOKEN);
  return token ? { "X-Owner-Token": token } : {};
}

export class ApiPanel {
  constructor(status) {
    this.status = status;
    this.offer = null;
    this.until = 0;
    this.chosen = "curl";
  }

  get base() {
    return new URL(".", location.href).href.replace(/\/$/, "");
  }

  get model() {
    return this.status.now?.model?.id ?? "default";
  }

  /** The key for this visitor; asked again when the last one is about to end. */
  async key() {
    if (this.offer?.key && Date.now() < this.until) return this.offer.key;
    const answer = await fetch("./ui/key", { headers: ownerHeaders(), cache: "no-store" });
    if (!answer.ok) throw new Error((await answer.json().catch(() => null))?.error?.message ?? "");
    this.offer = await answer.json();
    this.until = Date.now() + 1000 * ((this.offer.expires_in ?? 3600) - 60);
    return this.offer.key;
  }

  draw() {
    const key = el("code", { id: "key-value" }, MASK);
    this.shown = key;
    this.note = el("p", { className: "quiet", id: "key-note", role: "status" });
    byId("panel-api").replaceChildren(
      el("h2", {}, t("api_title")),
      row(t("base_url"), el("code", { id: "base-url" }, `${this.base}/v1`),
        copier(async () => `${this.base}/v1`)),
      row(t("model"), el("code", { id: "api-model" }, this.model), copier(async () => this.model)),
      row(t("api_key"), key, this.#showButton(), copier(() => this.#keyOrSay())),
      this.note,
      this.#tabs(),
    );
    if (this.offer) this.#tell();
  }

  refreshModel() {
    const place = byId("api-model");
    if (!place || place.textContent === this.model) return;
    place.textContent = this.model;
    this.#drawSnippet();
  }

  #showButton() {
    const button = el("button", { type: "button", className: "small", id: "key-show" }, t("show"));
    button.addEventListener("click", async () => {
      const isShown = this.shown.textContent !== MASK;
      this.#mask(button);
      if (isShown) return;
      const key = await this.#keyOrSay();
      if (!key) return;
      this.shown.textContent = key;
      button.textContent = t("hide");
      this.hiding = setTimeout(() => this.#mask(button), SHOWN_SECONDS * 1000);
    });
    return button;
  }

  #mask(button) {
    clearTimeout(this.hiding);
    this.shown.textContent = MASK;
    button.textContent = t("show");
  }

  async #keyOrSay() {
    try {
      const key = await this.key();
      this.#tell();
      return key;
    } catch (error) {
      this.note.textContent = `${t("key_failed")} ${error.message}`;
      return null;
    }
  }

  #tell() {
    const minutes = Math.round((this.offer.expires_in ?? 0) / 60);
    this.note.textContent = t(`key_${this.offer.kind}`, { minutes });
    this.#drawSnippet();
  }

  #tabs() {
    const choice = el("div", { role: "tablist", className: "tabs", aria: { label: t("programs") } });
    for (const name of Object.keys(SNIPPETS)) {
      const tab = el("button", { type: "button", role: "tab", id: `program-${name}` }, name);
      tab.setAttribute("aria-controls", "program");
      tab.addEventListener("click", () => {
        this.chosen = name;
        this.#drawSnippet();
      });
      choice.append(tab);
    }
    arrowKeys(choice);
    const text = el("pre", { id: "program", role: "tabpanel", tabIndex: 0 });
    const copy = copier(async () => {
      const key = this.#needsKey ? await this.#keyOrSay() : "";
      return key === null && this.#hasKey ? null : this.snippet(key || "$API_KEY");
    });
    copy.id = "program-copy";
    const top = el("div", { className: "code-top" }, el("span", { id: "program-note" }), copy);
    const whole = el("div", { className: "programs" }, choice,
      el("div", { className: "code" }, top, text));
    requestAnimationFrame(() => this.#drawSnippet());
    return whole;
  }

  get #needsKey() {
    return SNIPPETS[this.chosen]({ base: "", key: "\0", model: "" }).includes("\0");
  }

  /** Whether this page may give one, as far as it knows. */
  get #hasKey() {
    return this.offer?.kind !== "operator" && this.offer?.kind !== "off";
  }

  snippet(key) {
    return SNIPPETS[this.chosen]({ base: this.base, key, model: this.model });
  }

  #drawSnippet() {
    const text = byId("program");
    if (!text) return;
    text.textContent = this.snippet("$API_KEY");
    byId("program-note").textContent = this.#needsKey && this.#hasKey ? t("key_filled") : this.chosen;
    text.setAttribute("aria-labelledby", `program-${this.chosen}`);
    for (const tab of byId("panel-api").querySelectorAll('.tabs [role="tab"]')) {
      const isChosen = tab.id === `program-${this.chosen}`;
      tab.setAttribute("aria-selected", String(isChosen));
      tab.tabIndex = isChosen ? 0 : -1;
    }
  }
}

function row(name, ...content) {
  return el("div", { className: "api-row" }, el("span", { className: "name" }, name), ...content);
}

function copier(text) {
  const button = el("button", { type: "button", className: "small" }, t("copy"));
  button.addEventListener("click", async () => {
    const found = await text();
    if (found) showDone(button, t("copied"), await copyText(found));
  });
  return button;
}

/** Left and right move between the tabs of a list. */
export function arrowKeys(list) {
  list.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const tabs = [...list.querySelectorAll('[role="tab"]')];
    const next = tabs[(tabs.indexOf(document.activeElement) + step + tabs.length) % tabs.length];
    next.focus();
    next.click();
    event.preventDefault();
  });
}
