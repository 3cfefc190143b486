// What the reader has set, kept in this browser: answer options, theme, language.

import { byId, el } from "./dom.js";
import { setLanguage, t } from "./texts.js";

const KEY = "page-settings";
// null is the model's own: what its makers recommend.
export const DEFAULTS = { system: "", temperature: null, top_p: null, max_tokens: null, effort: "" };
const THEMES = ["system", "light", "dark"];

export class Settings {
  constructor() {
    try {
      this.saved = JSON.parse(localStorage.getItem(KEY) || "{}");
    } catch {
      this.saved = {};
    }
    this.efforts = [];
    this.contextLength = 0; // of the served model, in tokens
    this.makers = {}; // how the served model's makers want it sampled
  }

  get(name) {
    return this.saved[name] ?? DEFAULTS[name];
  }

  set(name, value) {
    this.saved[name] = value;
    localStorage.setItem(KEY, JSON.stringify(this.saved));
  }

  /** What goes with every turn; see serve/ui/options.py. */
  options() {
    const effort = this.efforts.includes(this.get("effort")) ? this.get("effort") : null;
    return {
      system: this.get("system"),
      temperature: this.get("temperature"),
      top_p: this.get("top_p"),
      max_tokens: this.get("max_tokens"),
      effort,
    };
  }

  reset() {
    for (const name of Object.keys(DEFAULTS)) delete this.saved[name];
    localStorage.setItem(KEY, JSON.stringify(this.saved));
  }
}

function choice(name, values, chosen, change) {
  const select = el("select", {}, ...values.map(([value, words]) => el("option", { value }, words)));
  select.value = chosen;
  select.addEventListener("change", () => change(select.value));
  return field(name, select);
}

const look = { theme: null, language: null };

export function drawSettings(settings) {
  const panel = byId("panel-settings");
  const system = el("textarea", { id: "set-system", rows: 4, value: settings.get("system") });
  system.addEventListener("input", () => settings.set("system", system.value));
  const reset = el("button", { type: "button", className: "wide" }, t("reset"));
  reset.addEventListener("click", () => {
    settings.reset();
    drawSettings(settings);
    drawEffort(settings);
    byId("panel-settings").querySelector("button").focus();
  });
  panel.replaceChildren(
    field("system", system, t("system_hint")),
    slider(settings, "temperature", 0, 2, 0.05),
    slider(settings, "top_p", 0.05, 1, 0.05),
    maxTokens(settings),
    reset,
    choice("theme", THEMES.map((name) => [name, t(`theme_${name}`)]), window.chatPage.theme,
      (name) => look.theme(name)),
    choice("language", [["en", "English"], ["zh-CN", "简体中文"]], window.chatPage.language,
      (name) => look.language(name)),
    el("p", { className: "quiet" }, t("settings_hint")),
  );
}

function field(name, control, hint = "") {
  control.setAttribute("id", `set-${name}`);
  return el("div", { className: "field" },
    el("label", { htmlFor: `set-${name}` }, t(name)), control,
    hint ? el("p", { className: "quiet" }, hint) : null);
}

function slider(settings, name, min, max, step) {
  const value = settings.get(name) ?? settings.makers[name] ?? 1;
  const shown = el("output", {}, String(value));
  const control = el("input", { type: "range", min, max, step });
  control.value = value;
  control.addEventListener("input", () => {
    settings.set(name, Number(control.value));
    shown.textContent = control.value;
  });
  const whole = field(name, control, t(`${name}_hint`));
  whole.querySelector("label").append(shown);
  return whole;
}

function maxTokens(settings) {
  const control = el("input", { type: "number", min: 1, step: 1, placeholder: t("max_tokens_auto"),
    value: settings.get("max_tokens") ?? "" });
  control.addEventListener("input", () => {
    const number = Math.floor(Number(control.value));
    settings.set("max_tokens", control.value && number >= 1 ? number : null);
  });
  return field("max_tokens", control);
}

/** The effort chip beside the composer: only for a model that has efforts. */
export function drawEffort(settings) {
  const place = byId("effort");
  place.hidden = settings.efforts.length === 0;
  if (place.hidden) return;
  const chosen = settings.efforts.includes(settings.get("effort")) ? settings.get("effort") : "";
  const select = el("select", { id: "effort-choice" },
    el("option", { value: "" }, t("effort_default")),
    ...settings.efforts.map((value) => el("option", { value }, t(`effort_${value}`))));
  select.value = chosen;
  select.addEventListener("change", () => settings.set("effort", select.value));
  place.replaceChildren(el("label", { htmlFor: "effort-choice" }, t("effort")), select);
}

export function bindLook(settings, redraw) {
  const theme = byId("theme");
  const name = () => {
    const label = t("theme_now", { theme: t(`theme_${window.chatPage.theme}`) });
    theme.title = label;
    theme.setAttribute("aria-label", label);
  };
  look.theme = (chosen) => {
    window.chatPage.theme = chosen;
    settings.set("theme", chosen);
    window.chatPage.paint();
    name();
  };
  look.language = (chosen) => {
    settings.set("language", chosen);
    setLanguage(chosen);
    redraw();
    name();
  };
  theme.addEventListener("click", () => {
    look.theme(THEMES[(THEMES.indexOf(window.chatPage.theme) + 1) % 3]);
    drawSettings(settings);
  });
  byId("language").addEventListener("click", () => {
    look.language(window.chatPage.language === "en" ? "zh-CN" : "en");
  });
  name();
}
