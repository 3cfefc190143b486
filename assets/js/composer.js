// The box: first our own, which is there with the first paint, then Gradio's in its place. Words
// alone are sent by us from either; with files Gradio's box sends. Also: keys, the draft, names for
// Gradio's buttons, notices about files.

import { byId, el } from "./dom.js";
import { t } from "./texts.js";

const DRAFT = "page-draft";
const TOLD_SECONDS = 10;
const isOfFiles = (event) => event.dataTransfer?.types.includes("Files");

export class Composer {
  constructor(chat, bridge, settings, models) {
    this.chat = chat;
    this.bridge = bridge;
    this.settings = settings;
    this.models = models;
    this.sees = null;
    this.told = "";
    this.names = []; // of the files in the box
    bridge.onfiles = (files) => {
      this.names = files.map((file) => file.orig_name ?? "");
      this.dress();
    };
    bridge.onfill = () => ({ text: this.area.value, files: [] });
  }

  /** The box that is on the page now. */
  get area() {
    return byId("early-text") ?? byId("composer").querySelector("textarea");
  }

  get isMounted() {
    return !byId("early-text");
  }

  fill(text) {
    const { area } = this;
    area.value = text;
    area.dispatchEvent(new Event("input", { bubbles: true })); // Gradio's box takes it from there
    localStorage.setItem(DRAFT, text);
  }

  /** What was in the box is a question now. Files are Gradio's to remove. */
  sent(hadFiles) {
    this.fill("");
    if (!hadFiles) return;
    this.bridge.slot.trigger("clear");
    this.#forgetFile();
  }

  // A browser says nothing when the file is chosen that was chosen last.
  #forgetFile() {
    for (const input of byId("composer").querySelectorAll('input[type="file"]')) input.value = "";
  }

  /** Send the words in the box; while an answer is written they stay there. */
  say() {
    this.chat.say(this.area.value);
  }

  /** From here on what is sent in the first box is a question; so is what was sent before. */
  takeEarly() {
    const { early } = this.bridge;
    this.bridge.early = "";
    this.bridge.onearly = () => this.say();
    if (!early) return;
    const next = this.area.value;
    this.chat.say(early);
    this.fill(next); // written since
  }

  /**
   * Gradio's box is on the page: it takes the place of ours, with its words, its caret and the
   * focus. `move` puts the page where Gradio's box can be used. Not amid an input method's word.
   */
  mount(move) {
    const early = byId("early-text");
    if (early.isComposing) {
      early.addEventListener("compositionend", () => setTimeout(() => this.mount(move)), { once: true });
      return;
    }
    const focused = document.activeElement;
    const { value, selectionStart, selectionEnd } = early;
    const box = byId("composer");
    move();
    byId("early").replaceWith(box);
    this.fill(value); // none, too: Gradio measures its box when something comes into it
    const isFree = focused === document.body && matchMedia("(pointer: fine)").matches;
    if (focused === early || isFree) {
      this.area.focus();
      this.area.setSelectionRange(selectionStart, selectionEnd);
    } else if (focused !== document.body) focused.focus();
    this.#listen(box);
    this.dress();
  }

  #listen(box) {
    box.addEventListener("keydown", (event) => this.#key(event), true);
    box.addEventListener("keypress", (event) => this.#enter(event), true);
    box.addEventListener("input", () => this.#keepDraft());
    box.addEventListener("click", (event) => {
      if (event.target.closest(".stop-button")) this.#ours(event, () => this.chat.stop());
      if (event.target.closest(".upload-button, .delete-button")) this.#forgetFile();
      if (event.target.closest(".submit-button") && !this.#hasFiles()) this.#ours(event);
    }, true);
    new MutationObserver(() => this.dress()).observe(box, { childList: true, subtree: true });
    document.addEventListener("dragover", (event) => isOfFiles(event) && event.preventDefault());
    document.addEventListener("drop", (event) => this.#drop(event));
  }

  /** Files dropped beside the box are meant for it; the browser would leave the page for them. */
  #drop(event) {
    if (event.defaultPrevented || !isOfFiles(event)) return;
    event.preventDefault();
    const input = byId("composer").querySelector('input[type="file"]');
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  }

  /** Names and hints in the reader's language on what Gradio leaves bare or in English. */
  dress() {
    this.area.placeholder = t("placeholder");
    const box = byId("composer");
    if (!box || !this.isMounted) return;
    const name = (selector, label) => {
      for (const node of box.querySelectorAll(selector)) {
        if (node.getAttribute("aria-label") !== label) node.setAttribute("aria-label", label);
        if (node.tagName === "BUTTON" && node.title !== label) node.title = label;
      }
    };
    name("textarea", t("message"));
    name(".upload-button", t("attach"));
    name(".submit-button", t("send"));
    name(".stop-button", t("stop"));
    name('.full-container[role="group"]', t("message"));
    name("button.upload-container", t("attach"));
    name('input[type="file"]', t("attach"));
    name(".thumbnails", t("attached_files"));
    this.#nameFiles([...box.querySelectorAll(".thumbnail-item")]);
    // A list's item outside a list, for Gradio; a group to who listens.
    for (const node of box.querySelectorAll('[role="listitem"]')) node.setAttribute("role", "group");
    for (const image of box.querySelectorAll("img")) {
      if (image.alt !== "") image.alt = "";
    }
    this.drawNotices();
  }

  /** Gradio shows a sheet of paper for a file; which one it is only its value tells. */
  #nameFiles(items) {
    if (items.length !== this.names.length) this.bridge.slot.trigger("upload");
    for (const [i, item] of items.entries()) {
      const name = this.names[i] || t("file");
      const label = t("remove_file", { name });
      item.title = name;
      item.parentElement.setAttribute("aria-label", name);
      if (!item.querySelector("img")) item.dataset.name = name;
      for (const button of item.querySelectorAll(".delete-button")) {
        button.setAttribute("aria-label", label);
        button.title = label;
      }
    }
  }

  running(isRunning) {
    byId("shell").classList.toggle("running", isRunning);
    byId("hint").textContent = "";
  }

  /** Say something beside the box for a while. */
  tell(words) {
    clearTimeout(this.forgetting);
    this.told = words;
    this.forgetting = setTimeout(() => this.tell(""), TOLD_SECONDS * 1000);
    this.drawNotices();
  }

  drawNotices() {
    const box = byId("composer");
    const hasPicture = this.isMounted && box.querySelector(".thumbnails img, .thumbnail-item img");
    const isBlind = hasPicture && this.sees === false;
    const seeing = isBlind ? this.models.seeing : [];
    const key = [isBlind && this.settings.shownModel, ...seeing, this.told, t("message")].join("\n");
    const place = byId("dock-notices");
    if (place.key === key) return;
    place.key = key;
    const offers = seeing.map((model) =>
      el("button", { type: "button", className: "small", on: { click: () => this.models.choose(model) } },
        t("switch_to", { model })));
    place.replaceChildren(...[
      isBlind ? el("p", { className: "notice" },
        t("cannot_see", { model: this.settings.shownModel }), ...offers) : "",
      this.told ? el("p", { className: "notice", role: "alert" }, this.told) : "",
    ].filter(Boolean));
  }

  #hasFiles() {
    return Boolean(byId("composer").querySelector(".thumbnails, .thumbnail-item, .loader, progress"));
  }

  #ours(event, act = () => this.say()) {
    event.preventDefault();
    event.stopImmediatePropagation();
    act();
  }

  #keepDraft() {
    clearTimeout(this.saving);
    this.saving = setTimeout(() => localStorage.setItem(DRAFT, this.area.value), 200);
  }

  #key(event) {
    if (event.key === "ArrowUp" && !this.area.value && !event.isComposing) {
      if (this.onarrowup?.()) event.preventDefault();
    }
  }

  // On a phone Enter makes a new line; while an answer runs the text waits in the box. (Gradio's
  // own box already lets an input method's Enter pass.)
  #enter(event) {
    if (event.key !== "Enter" || event.shiftKey) return;
    if (matchMedia("(pointer: coarse)").matches) event.stopImmediatePropagation();
    else if (this.chat.isRunning || !this.#hasFiles()) this.#ours(event);
  }
}
