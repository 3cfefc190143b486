// Runs before the first paint: theme and language, so that nothing flashes, and the bridge that
// Gradio's parts call (see serve/ui/page.py), which may happen before main.js has loaded.
(() => {
  const saved = JSON.parse(localStorage.getItem("page-settings") || "{}");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const paint = () => {
    const theme = window.chatPage.theme;
    const isDark = theme === "dark" || (theme !== "light" && dark.matches);
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    document.body?.classList.toggle("dark", isDark);
  };
  const chinese = /^zh\b/i.test(saved.language || navigator.language);
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
      onbroken: null,
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
