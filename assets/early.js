// Runs before the first paint: theme and language, so that nothing flashes; the first box, which
// can be typed into and sent from at once; and the bridge that Gradio's parts call (see
// serve/ui/page.py), which may happen before main.js has loaded.
(() => {
  const DRAFT = "page-draft";
  // A browser may forbid storage to a page inside another's frame: it then lasts as long as the page.
  for (const name of ["localStorage", "sessionStorage"]) {
    try {
      window[name].getItem(DRAFT);
    } catch {
      const kept = new Map();
      const value = { getItem: (key) => kept.get(key) ?? null, removeItem: (key) => kept.delete(key),
        setItem: (key, text) => kept.set(key, String(text)) };
      Object.defineProperty(window, name, { value });
    }
  }
  let saved = {};
  try {
    saved = JSON.parse(localStorage.getItem("page-settings")) ?? {};
  } catch {
    // Not ours, or broken: as on a first visit.
  }
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const theme = window.chatPage.theme;
    const isDark = theme === "dark" || (theme !== "light" && dark.matches);
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    document.body?.classList.toggle("dark", isDark);
  };
  const chinese = /^zh\b/i.test(saved.language || navigator.language);
  const byId = (id) => document.getElementById(id);
  window.chatPage = {
    language: chinese ? "zh-CN" : "en",
    theme: saved.theme || "system",
    paint,
    bridge: {
      slot: null,
      onpage: null,
      onnews: null,
      onprepare: null,
      onfill: null,
      onfiles: null,
      onbroken: null,
      onearly: null,
      early: "", // what was sent before main.js was there to send it
      page(element, trigger) {
        this.slot = { element, trigger };
        this.onpage?.();
      },
      news(value) {
        this.onnews?.(value);
      },
      prepare(box, turn, memory) {
        return this.onprepare(box, turn, memory);
      },
      broken() {
        this.onbroken?.();
      },
      fill() {
        return this.onfill();
      },
      files(box) {
        this.onfiles?.(box?.files ?? []);
      },
      /** The first box is in the document (shell.html calls this right behind it). */
      box() {
        const box = byId("early-text");
        const fit = () => {
          box.style.height = "";
          box.style.height = `${Math.min(box.scrollHeight, innerHeight * 0.4)}px`;
        };
        box.placeholder = chinese ? "请输入问题…" : "Ask anything…";
        byId("state-words").textContent = chinese ? "正在加载…" : "Loading…";
        byId("language").textContent = chinese ? "EN" : "中文";
        box.value = localStorage.getItem(DRAFT) ?? "";
        fit();
        box.addEventListener("input", () => {
          localStorage.setItem(DRAFT, box.value);
          fit();
        });
        box.addEventListener("compositionstart", () => (box.isComposing = true));
        box.addEventListener("compositionend", () => (box.isComposing = false));
        box.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
          if (matchMedia("(pointer: coarse)").matches) return; // there Enter is a new line
          event.preventDefault();
          this.sendEarly();
        });
        byId("early-send").addEventListener("click", () => this.sendEarly());
      },
      sendEarly() {
        const box = byId("early-text");
        if (this.onearly) this.onearly();
        else if (!this.early && box.value.trim()) {
          this.early = box.value;
          const bubble = document.createElement("div");
          bubble.className = "bubble";
          bubble.textContent = box.value;
          const turn = document.createElement("article");
          turn.className = "turn user";
          turn.append(bubble);
          byId("transcript").append(turn);
          box.value = "";
        }
      },
    },
  };
  dark.addEventListener("change", paint);
  paint();
  // Gradio sets its own language and its own class once it starts: ours are the ones that count.
  const root = document.documentElement;
  root.lang = window.chatPage.language;
  new MutationObserver(() => {
    if (root.lang !== window.chatPage.language) root.lang = window.chatPage.language;
  }).observe(root, { attributes: true, attributeFilter: ["lang"] });
  document.addEventListener("DOMContentLoaded", () => {
    paint();
    new MutationObserver(() => {
      const isDark = document.documentElement.dataset.theme === "dark";
      if (document.body.classList.contains("dark") !== isDark) paint();
    }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  });
})();
