// On a phone the clip opens a menu: files, the effort, how full the context is. Elsewhere the last
// two stand below the box, where they go back when the window grows.

import { byId, el, icon } from "./dom.js";
import { t } from "./texts.js";

const PHONE = matchMedia("(max-width: 599px)");

export class ClipMenu {
  constructor() {
    this.menu = byId("clip-menu");
    PHONE.addEventListener("change", () => this.place());
    this.menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      this.#show(false);
    });
    document.addEventListener("click", (event) => {
      if (!this.menu.hidden && !event.target.closest("#clip-menu, .upload-button")) this.#show(false);
    });
  }

  /** Gradio's box is on the page: its clip is ours to answer, on a phone. */
  mount(box) {
    box.addEventListener("click", (event) => {
      const clip = event.target.closest(".upload-button");
      if (!clip || !PHONE.matches || this.isAttaching) return;
      event.preventDefault();
      event.stopImmediatePropagation();
      this.clip = clip;
      this.#show(this.menu.hidden);
    }, true);
    this.place();
  }

  /** Effort and context where they belong; a nearly full context is always in sight. */
  place() {
    const [effort, context] = [byId("effort"), byId("context")];
    const isInMenu = PHONE.matches && !context.classList.contains("full");
    if (PHONE.matches) this.menu.append(this.#attach(), effort);
    else byId("dock-tools").prepend(effort);
    (isInMenu ? this.menu : byId("dock-tools")).append(context);
    if (!PHONE.matches) this.menu.hidden = true;
  }

  #attach() {
    const open = () => {
      this.isAttaching = true;
      this.clip.click();
      this.isAttaching = false;
      this.#show(false);
    };
    this.button ??= el("button", { type: "button", id: "clip-attach", on: { click: open } });
    if (this.button.textContent !== t("attach")) this.button.replaceChildren(icon("file"), t("attach"));
    return this.button;
  }

  #show(isOpen) {
    this.menu.hidden = !isOpen;
    this.clip.setAttribute("aria-expanded", String(isOpen));
    (isOpen ? this.button : this.clip).focus();
  }
}
