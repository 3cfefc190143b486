// Around Gradio's own box: keys, the draft, filling it, names for its buttons, notices about files.

import { byId, el } from "./dom.js";
import { t } from "./texts.js";

const DRAFT = "page-draft";

export class Composer {
  constructor(chat, bridge, settings) {
    this.chat = chat;
    this.bridge = bridge;
    this.settings = settings;
    this.next = { text: "", files: [] };
    this.sees = null;
    bridge.onfill = () => this.next;
    byId("early-text").value = localStorage.getItem(DRAFT) ?? "";
    byId("early-text").placeholder = t("placeholder");
  }

  get area() {
    return byId("composer")?.querySelector("textarea") ?? null;
  }

  /** Put text and files into Gradio's box. */
  fill(text, files = []) {
    this.next = { text, files };
    this.bridge.slot?.trigger("clear");
    localStorage.setItem(DRAFT, text);
  }

  /** Gradio's box is on the page: take over what was typed into ours before it came. */
  mount() {
    const early = byId("early-text");
    const hadFocus = document.activeElement === early || document.activeElement === document.body;
    const box = byId("composer");
    byId("early").replaceWith(box);
    if (early.value) this.fill(early.value);
    box.addEventListener("keydown", (event) => this.#key(event), true);
    box.addEventListener("keypress", (event) => this.#enter(event), true);
    box.addEventListener("input", () => this.#keepDraft());
    box.addEventListener("click", (event) => {
      if (event.target.closest(".stop-button")) this.chat.stopped();
    });
    new MutationObserver(() => this.dress()).observe(box, { childList: true, subtree: true });
    this.dress();
    if (hadFocus && matchMedia("(pointer: fine)").matches) this.area.focus();
  }

  /** Names and hints in the reader's language on what Gradio leaves bare or in English. */
  dress() {
    const box = byId("composer");
    if (!box) return;
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
    name(".delete-button", t("remove_file"));
    name('[role="group"]', t("message"));
    name("button.upload-container", t("attach"));
    name('input[type="file"]', t("attach"));
    if (this.area.placeholder !== t("placeholder")) this.area.placeholder = t("placeholder");
    for (const image of box.querySelectorAll("img")) {
      if (image.alt !== "") image.alt = "";
    }
    this.#notices();
  }

  running(isRunning) {
    byId("shell").classList.toggle("running", isRunning);
    byId("hint").textContent = "";
  }

  #notices() {
    const hasPicture = Boolean(byId("composer").querySelector(".thumbnails img, .thumbnail-item img"));
    const blind = hasPicture && this.sees === false;
    const place = byId("dock-notices");
    const words = blind ? t("cannot_see", { model: this.settings.shownModel }) : "";
    if (place.textContent !== words) {
      place.replaceChildren(...(words ? [el("p", { className: "notice" }, words)] : []));
    }
  }

  #keepDraft() {
    clearTimeout(this.saving);
    this.saving = setTimeout(() => localStorage.setItem(DRAFT, this.area?.value ?? ""), 200);
  }

  #key(event) {
    if (event.key === "ArrowUp" && !this.area.value && !event.isComposing) {
      if (this.onarrowup?.()) event.preventDefault();
    }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing && this.chat.isRunning) {
      byId("hint").textContent = t("still_running");
    }
  }

  // On a phone Enter makes a new line; while an answer runs the text waits in the box. (Gradio's
  // own box already lets an input method's Enter pass.)
  #enter(event) {
    if (event.key !== "Enter" || event.shiftKey) return;
    if (this.chat.isRunning) {
      event.preventDefault();
      event.stopImmediatePropagation();
    } else if (matchMedia("(pointer: coarse)").matches) {
      event.stopImmediatePropagation();
    }
  }
}
