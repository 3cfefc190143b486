// The models that may serve here: the chooser in the header, and trying again after a failure. One
// model serves at a time, for everybody; choosing another has the server load it in its place.

import { ownerHeaders } from "./api_panel.js";
import { byId, el } from "./dom.js";
import { has, t } from "./texts.js";

export class Models {
  constructor(status) {
    this.status = status;
    this.ontold = null; // shows why it was refused
    byId("model-choice").addEventListener("change", (event) => this.choose(event.target.value));
  }

  /** Those that see images and do not serve now. */
  get seeing() {
    const { now } = this.status;
    return (now?.seeing ?? []).filter((id) => id !== now.model?.id);
  }

  choose(id) {
    return this.#ask({ model: id });
  }

  tryAgain() {
    return this.#ask({});
  }

  async #ask(body) {
    try {
      const answer = await fetch("./ui/model", { method: "POST", body: JSON.stringify(body),
        headers: { "Content-Type": "application/json", ...ownerHeaders() } });
      if (!answer.ok) this.#refused((await answer.json().catch(() => null))?.error?.code);
    } catch {
      this.#refused("connection_lost");
    }
    await this.status.poll();
    this.draw();
  }

  #refused(code) {
    const known = has(`error_${code}`) ? code : "server_error";
    this.ontold?.(`${t(`error_${known}`)} ${t(`error_${known}_do`)}`);
  }

  /** A chooser when there are several; it shows what serves, or what is being switched to. */
  draw() {
    const { now } = this.status;
    const choice = byId("model-choice");
    const shown = now?.wanted || now?.model?.id || "";
    const ids = [...new Set([...(now?.offered ?? []), shown])];
    choice.hidden = (now?.offered ?? []).length < 2;
    byId("model-name").hidden = !choice.hidden;
    const sees = (id) => id !== shown && now.seeing.includes(id); // of the shown one the badge says it
    const label = (id) => (sees(id) ? `${id} (${t("sees")})` : id || t("choose_model"));
    const key = ids.map((id) => label(id)).join();
    if (choice.key !== key) {
      choice.key = key;
      choice.replaceChildren(...ids.map((id) => el("option", { value: id }, label(id))));
    }
    choice.value = shown;
  }
}
