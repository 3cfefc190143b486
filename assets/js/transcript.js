// Draws the conversation. What was typed is shown as typed; answers are Markdown; every turn has
// its actions. While an answer grows only its own blocks are touched, and the page follows it only
// while the reader is at the bottom.

import { offerToCut } from "./context.js";
import { byId, copyText, el, icon, iconButton, showDone } from "./dom.js";
import { draw } from "./markdown.js";
import { drawNotes, statsLine } from "./notes.js";
import { t } from "./texts.js";

const NEAR = 60;

export class Transcript {
  constructor(chat, store) {
    this.chat = chat;
    this.store = store;
    this.turns = new Map();
    this.scroller = byId("scroller");
    this.log = byId("transcript");
    this.isFollowing = true;
    this.#watchScroll();
    setInterval(() => this.#tick(), 1000);
  }

  drawAll({ follow = false } = {}) {
    const path = this.chat.path();
    byId("empty").hidden = path.length > 0;
    const before = this.turns;
    this.turns = new Map();
    const nodes = path.map((node) => {
      const known = before.get(node.id);
      const isSame = known?.shown === fingerprint(node, this.chat) || isEdited(known);
      const turn = isSame ? known : this.#turn(node);
      this.turns.set(node.id, turn);
      return turn;
    });
    const first = this.chat.first(path);
    if (first) nodes.splice(path.indexOf(first), 0, this.#cutLine(path.indexOf(first)));
    const hadFocus = this.log.contains(document.activeElement);
    replaceInOrder(this.log, nodes);
    if (hadFocus && !this.log.contains(document.activeElement)) this.#holdFocus();
    if (follow) this.follow();
  }

  /** Above the first message that the model still reads. */
  #cutLine(count) {
    const words = t("cut_line", { count });
    if (this.cut?.textContent !== words) this.cut = el("p", { className: "cut-line" }, words);
    return this.cut;
  }

  redraw(node) {
    const old = this.turns.get(node.id);
    if (!old || isEdited(old)) return;
    const fresh = this.#turn(node);
    this.turns.set(node.id, fresh);
    old.replaceWith(fresh);
    this.#keepUp();
  }

  /** An answer has grown. */
  grow(node, run) {
    const turn = this.turns.get(node.id);
    if (turn) this.#fillAnswer(turn, node, run);
    this.#keepUp();
  }

  /** What had the focus is gone: the keyboard goes on from here, not from the page's beginning. */
  #holdFocus() {
    this.scroller.focus({ preventScroll: true });
  }

  follow() {
    this.isFollowing = true;
    this.#keepUp();
  }

  #keepUp() {
    if (this.isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
    byId("newest").hidden = this.isFollowing || this.log.childElementCount === 0;
  }

  #watchScroll() {
    const { scroller } = this;
    let last = 0;
    let moved = 0;
    // A redrawn turn moves the text too; only the reader's own hand lets go of the end.
    for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"]) {
      scroller.addEventListener(kind, () => (moved = Date.now()), { passive: true });
    }
    scroller.addEventListener("scroll", () => {
      const distance = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
      const isByHand = Date.now() - moved < 1000;
      if (isByHand && scroller.scrollTop < last - 1 && distance > 2) this.isFollowing = false;
      else if (distance < NEAR) this.isFollowing = true;
      last = scroller.scrollTop;
      byId("newest").hidden = this.isFollowing || distance < NEAR;
    }, { passive: true });
    scroller.addEventListener("wheel", (event) => {
      if (event.deltaY < 0 && scroller.scrollHeight > scroller.clientHeight) {
        this.isFollowing = false;
      }
    }, { passive: true });
    // What is opened is to be read: the page stays where it is.
    this.log.addEventListener("click", (event) => {
      const block = event.target.closest("summary")?.parentElement;
      if (block && !block.open) this.isFollowing = false;
    });
    byId("newest").addEventListener("click", () => this.follow());
    new ResizeObserver(() => this.#keepUp()).observe(this.log);
  }

  #tick() {
    const { run } = this.chat;
    const turn = run && this.turns.get(run.node.id);
    if (turn) this.#fillThought(turn, run.node, run);
  }

  // -- one turn ------------------------------------------------------------------------------------

  #turn(node) {
    const turn = el("article", { className: `turn ${node.role}`, data: { id: node.id } });
    turn.setAttribute("aria-label", t(node.role === "user" ? "you_said" : "answer"));
    turn.shown = fingerprint(node, this.chat);
    if (node.role === "user") this.#fillQuestion(turn, node);
    else {
      turn.append(el("div", { className: "thoughts" }), el("div", { className: "words md" }),
        el("div", { className: "calls" }), el("div", { className: "notes" }),
        el("div", { className: "actions" }));
      this.#fillAnswer(turn, node, this.chat.run);
    }
    return turn;
  }

  #fillQuestion(turn, node) {
    if (node.files?.length) turn.append(this.#files(node.files));
    if (node.text) turn.append(this.#bubble(node.text));
    turn.append(el("div", { className: "actions" },
      this.#copyButton(node),
      iconButton("edit", t("edit"), () => this.editTurn(node)),
      this.#versions(node)));
  }

  /** A long text has a scroll bar of its own, which the keyboard must reach. */
  #bubble(text) {
    return el("div", { className: "bubble", tabIndex: text.length > 1000 ? 0 : null }, text);
  }

  #files(files) {
    const items = files.map((file) => {
      if (file.kind === "image" && file.picture) return this.#picture(file);
      const chip = el("details", { className: "file" },
        el("summary", {}, icon(file.kind === "image" ? "image" : "file"), file.name));
      chip.append(el("pre", { tabIndex: 0 }, file.note ? t(file.note) : (file.text ?? "").slice(0, 4000)));
      return chip;
    });
    return el("div", { className: "files" }, ...items);
  }

  #picture(file) {
    const image = el("img", { alt: t("picture", { name: file.name }), className: "picture" });
    this.store.picture(file.picture).then((blob) => {
      if (!blob) return image.replaceWith(t("picture", { name: file.name }));
      image.src = URL.createObjectURL(blob);
      image.onload = () => {
        URL.revokeObjectURL(image.src);
        this.#keepUp();
      };
      return undefined;
    });
    return image;
  }

  #fillAnswer(turn, node, run) {
    const isOurs = run?.node.id === node.id;
    const isRunning = isOurs || node.state === "running"; // in another tab
    turn.dataset.state = node.state;
    turn.setAttribute("aria-busy", String(isRunning));
    this.#fillThought(turn, node, isOurs ? run : null);
    const words = turn.querySelector(".words");
    draw(words, node.text, !isRunning);
    words.classList.toggle("growing", isRunning && Boolean(node.text));
    this.#fillCalls(turn.querySelector(".calls"), node);
    drawNotes(turn.querySelector(".notes"), node, isRunning, {
      isElsewhere: !isOurs && this.chat.tabs.isWriting(node),
      offer: () => offerToCut(this.chat, node),
    });
    const actions = turn.querySelector(".actions");
    if (isRunning) actions.replaceChildren();
    else if (!actions.childElementCount) actions.append(...this.#answerActions(node));
  }

  #fillThought(turn, node, run) {
    const place = turn.querySelector(".thoughts");
    const isThinking = run?.node.id === node.id && node.phase === "thinking";
    if (!node.reasoning) return place.replaceChildren();
    let block = place.firstElementChild;
    if (!block) {
      block = el("details", {}, el("summary"), el("div", { className: "thought md" }));
      block.addEventListener("click", (e) => e.isTrusted && (block.dataset.touched = "yes"));
      place.append(block);
    }
    const seconds = isThinking ? (Date.now() - run.thinkingSince) / 1000 : node.thought;
    const title = isThinking ? "thinking_for" : seconds == null ? "thought" : "thought_for";
    const words = t(title, { seconds: Math.max(isThinking ? 0 : 1, Math.round(seconds ?? 0)) });
    const summary = block.querySelector("summary");
    if (summary.textContent !== words) summary.textContent = words;
    if (!block.dataset.touched) block.open = isThinking;
    block.classList.toggle("live", isThinking);
    const text = block.querySelector(".thought");
    draw(text, node.reasoning, !isThinking);
    if (isThinking) {
      text.scrollTop = text.scrollHeight;
      text.classList.toggle("long", text.scrollTop > 0);
    }
    return undefined;
  }

  #fillCalls(place, node) {
    const calls = node.calls ?? [];
    const key = JSON.stringify(calls);
    if (place.key === key) return;
    place.key = key;
    place.replaceChildren(...calls.map((call) =>
      el("details", { className: "call", open: true },
        el("summary", {}, t("tool_call"), " ", el("code", {}, call.name)),
        el("pre", { tabIndex: 0 }, pretty(call.arguments)))));
  }

  #answerActions(node) {
    const { chat } = this;
    const canGoOn = node.text && (node.state === "stopped" || node.cut);
    const retry = el("button", { type: "button", className: "small" }, t("retry"));
    retry.addEventListener("click", () => chat.retry(node));
    const goOn = el("button", { type: "button", className: "small" }, t("continue"));
    goOn.addEventListener("click", () => chat.goOn(node));
    const isWhole = node.state === "done";
    return [
      isWhole ? null : retry,
      canGoOn ? goOn : null,
      this.#versions(node), // always in sight, so first; the others come with the mouse
      node.text ? this.#copyButton(node) : null,
      isWhole ? iconButton("retry", t("retry"), () => chat.retry(node)) : null,
      node.text ? iconButton("edit", t("edit"), () => this.editTurn(node)) : null,
      el("span", { className: "stats" }, statsLine(node)),
    ].filter(Boolean);
  }

  #copyButton(node) {
    const button = iconButton("copy", t("copy"), async () => {
      showDone(button, "", await copyText(node.text));
    });
    return button;
  }

  /** ‹2/3› when there are several. */
  #versions(node) {
    const all = this.chat.versions(node);
    if (all.length < 2) return null;
    const at = all.indexOf(node);
    const go = (to) => {
      this.chat.choose(all[to]);
      this.turns.get(all[to].id)?.querySelector(".versions button:not(:disabled)")?.focus();
    };
    const isBusy = this.chat.isRunning;
    return el("span", { className: "versions", role: "group", aria: { label: t("versions") } },
      iconButton("left", t("version_before"), () => go(at - 1), { disabled: at === 0 || isBusy }),
      el("span", {}, `${at + 1}/${all.length}`),
      iconButton("right", t("version_after"), () => go(at + 1),
        { disabled: at === all.length - 1 || isBusy }));
  }

  editLast() {
    const asked = this.chat.path().filter((node) => node.role === "user").at(-1);
    if (asked) this.editTurn(asked);
    return Boolean(asked);
  }

  editTurn(node) {
    const turn = this.turns.get(node.id);
    if (!turn || turn.querySelector(".editor")) return;
    const isQuestion = node.role === "user";
    const area = el("textarea", { value: node.text, rows: Math.min(12, node.text.split("\n").length + 1) });
    area.setAttribute("aria-label", t("edit"));
    const done = () => {
      this.#holdFocus();
      editor.remove();
      turn.classList.remove("editing");
      this.redraw(node); // what has changed meanwhile
    };
    const cancel = () => {
      done();
      this.turns.get(node.id)?.querySelector(".actions button")?.focus();
    };
    const save = () => {
      if (!area.value.trim() || !this.chat.isFree()) return;
      done();
      if (isQuestion) this.chat.edit(node, area.value);
      else this.chat.rewrite(node, area.value);
    };
    const editor = el("div", { className: "editor" }, area, el("div", { className: "row" },
      el("button", { type: "button", className: "primary", on: { click: save } },
        t(isQuestion ? "send_again" : "keep")),
      el("button", { type: "button", on: { click: cancel } }, t("cancel"))));
    editor.addEventListener("keydown", (event) => {
      if (event.key === "Escape") {
        event.stopPropagation();
        done();
        byId("composer")?.querySelector("textarea")?.focus();
      }
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) save();
    });
    turn.classList.add("editing");
    turn.prepend(editor);
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}

/** A turn with an open editor is not drawn anew: what is typed there would be lost. */
const isEdited = (turn) => Boolean(turn?.querySelector(".editor"));

/** What a turn's drawing depends on besides its own text. */
function fingerprint(node, chat) {
  const all = chat.versions(node);
  return [node.id, node.state, all.indexOf(node), all.length, chat.isRunning, node.files?.length,
    document.documentElement.lang].join();
}

function replaceInOrder(parent, nodes) {
  const wanted = new Set(nodes);
  for (const child of [...parent.children]) if (!wanted.has(child)) child.remove();
  nodes.forEach((node, i) => {
    if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null);
  });
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}
