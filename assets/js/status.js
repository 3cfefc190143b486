// What the model is doing, in words, for everyone who looks and from the first second.

import { byId, el } from "./dom.js";
import { serverWords } from "./notes.js";
import { bytes, duration, t } from "./texts.js";

const WAITS = { busy: 1000, ready: 20000, several: 4000 }; // ms; a model of several may change

export class Status {
  constructor() {
    this.now = null;
    this.isLost = false;
    this.listeners = [];
    this.failures = 0;
    this.timer = 0;
    this.ontryagain = null;
    document.addEventListener("visibilitychange", () => document.hidden || this.poll());
    window.addEventListener("online", () => this.poll());
  }

  /** `listener(now, before)`; `now` is null while the server cannot be reached. */
  listen(listener) {
    this.listeners.push(listener);
  }

  get isReady() {
    return Boolean(this.now?.ready);
  }

  async poll() {
    clearTimeout(this.timer);
    const before = this.now;
    try {
      const answer = await fetch("./ui/status", { cache: "no-store" });
      if (!answer.ok) throw new Error(answer.status);
      this.now = await answer.json();
      this.isLost = false;
      this.failures = 0;
    } catch {
      this.failures += 1;
      this.isLost = this.failures > 1;
    }
    this.draw();
    for (const listener of this.listeners) listener(this.now, before);
    const wait = this.failures
      ? Math.min(15000, 500 * 2 ** this.failures)
      : !this.isReady ? WAITS.busy : this.now.offered.length > 1 ? WAITS.several : WAITS.ready;
    this.timer = setTimeout(() => (document.hidden && !this.failures ? null : this.poll()), wait);
  }

  draw() {
    if (!this.now) return;
    const { now } = this;
    const words = this.words();
    byId("shell").dataset.state = this.isLost ? "lost" : now.ready ? "ready" : now.progress.phase;
    const place = byId("state-words");
    if (place.textContent !== words) place.textContent = words;
    byId("model-name").textContent = now.model?.id ?? (now.progress.candidate || now.requested);
    this.#drawBadge();
    this.#drawBanner();
  }

  words() {
    const { now } = this;
    if (this.isLost) return t("state_lost");
    if (now.ready) {
      return now.waiting > 0 ? t("state_busy", { waiting: now.waiting }) : t("state_ready");
    }
    return t(`state_${now.progress.phase}`); // how far it is stands in the banner
  }

  #drawBadge() {
    const badge = byId("model-badge");
    const sees = this.now.model?.capabilities.vision;
    badge.hidden = !this.now.model;
    const word = sees === true ? "sees" : sees === false ? "text_only" : "sight_unknown";
    badge.textContent = t(word);
  }

  #drawBanner() {
    const banner = byId("banner");
    const content = this.isLost ? [t("banner_lost")] : this.#loading();
    banner.hidden = content.length === 0;
    // Bytes change every second: they are for the eye, not to be read out each time.
    banner.role = content.some((part) => part.id === "download") ? "group" : "alert";
    const key = content.map((part) => part.outerHTML ?? part).join("");
    if (banner.key === key) return;
    banner.key = key;
    banner.replaceChildren(...content);
  }

  #loading() {
    const { now } = this;
    const { progress } = now;
    const parts = [];
    if (!now.ready && progress.phase === "failed") {
      parts.push(el("strong", {}, t("banner_failed")), serverWords(progress.detail),
        el("button", { type: "button", className: "small", id: "try-again",
          on: { click: () => this.ontryagain() } }, t("try_again")));
    } else if (!now.ready && (progress.total_bytes || progress.phase === "downloading")) {
      const known = progress.total_bytes
        ? { max: progress.total_bytes, value: progress.done_bytes ?? 0 } : {};
      parts.push(el("label", { htmlFor: "download" }, howFar(progress)),
        el("progress", { id: "download", ...known }));
    }
    if (now.passed_over.length && (now.ready || progress.phase === "failed")) {
      parts.push(this.#passedOver());
    }
    return parts;
  }

  /** Another model than the one asked for serves: which, why, and what to set. */
  #passedOver() {
    const items = this.now.passed_over.map((p) =>
      el("li", {}, el("b", {}, p.candidate), ` — ${sentence(p.reason)} ${p.fix ?? ""}`));
    const model = this.now.model?.id ?? "";
    const title = model ? t("banner_other", { model, asked: this.now.requested }) : t("why");
    return el("details", { className: "reasons" }, el("summary", {}, title), el("ul", {}, ...items));
  }
}

const sentence = (words) => (/[.!?]$/.test(words) ? words : `${words}.`);

/** Bytes, speed and time of a download, or of weights on their way into memory. */
function howFar(progress) {
  const isLoading = progress.phase === "loading";
  if (progress.stalled_seconds > 5 && !isLoading) {
    return t("progress_stalled", { seconds: Math.round(progress.stalled_seconds),
      attempt: progress.attempt });
  }
  const parts = [];
  if (progress.total_bytes) {
    parts.push(t(isLoading ? "progress_loading" : "progress_downloading",
      { done: bytes(progress.done_bytes ?? 0), total: bytes(progress.total_bytes) }));
  } else parts.push(t("progress_some", { done: bytes(progress.done_bytes ?? 0) }));
  if (progress.bytes_per_second) parts.push(`${bytes(progress.bytes_per_second)}/s`);
  if (progress.seconds_left) {
    parts.push(t("progress_left", { time: duration(progress.seconds_left) }));
  }
  return parts.join(" · ");
}
