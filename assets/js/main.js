// Puts the page together: early, before Gradio's script has loaded, then with Gradio's box in it.

import { ApiPanel, arrowKeys, takeOwnerToken } from "./api_panel.js";
import { Chat } from "./chat.js";
import { ClipMenu } from "./clip_menu.js";
import { Composer } from "./composer.js";
import { drawContext } from "./context.js";
import { Conversations } from "./conversations.js";
import { byId, el } from "./dom.js";
import { loadMarkdown } from "./markdown.js";
import { Models } from "./models.js";
import { Settings, bindLook, drawEffort, drawSettings } from "./settings.js";
import { Status } from "./status.js";
import { Store } from "./store.js";
import { count, setLanguage, t } from "./texts.js";
import { Transcript } from "./transcript.js";

const LAST = "page-conversation";
const SILENCE = 5000; // the server gives a sign of life every second
const SLOWEST_START = 60000; // a message sent at once waits this long for Gradio's script

async function start() {
  loadMarkdown();
  takeOwnerToken();
  setLanguage(window.chatPage.language);
  const { bridge } = window.chatPage;
  const settings = new Settings();
  const store = await Store.open();
  const status = new Status();
  const chat = new Chat(store, settings, bridge);
  const transcript = new Transcript(chat, store);
  const models = new Models(status);
  const composer = new Composer(chat, bridge, settings, models);
  const open = (id) => openConversation(page, id);
  const conversations = new Conversations(chat, store, open);
  const api = new ApiPanel(status);
  const page = { bridge, settings, store, status, chat, transcript, composer, conversations, api,
    models, clip: new ClipMenu() };
  window.chatPage.parts = page;

  chat.view = viewOf(page);
  models.ontold = (words) => composer.tell(words);
  status.ontryagain = () => models.tryAgain();
  drawWords(page);
  bindHeader(page);
  bindSidebar(page);
  bindKeys(page);
  status.listen((now, before) => statusChanged(page, now, before));
  await open(localStorage.getItem(LAST));
  composer.takeEarly();
  bridge.onpage = () => whenBoxIsThere(() => adopt(page));
  if (bridge.slot) bridge.onpage();
  await status.poll();
  setInterval(() => watchRun(page), 1000);
  addEventListener("pagehide", () => chat.leave());
}

function viewOf(page) {
  const { transcript, composer, conversations } = page;
  return {
    drawAll: (options) => transcript.drawAll(options),
    redraw: (node) => transcript.redraw(node),
    grow: (node, run) => transcript.grow(node, run),
    listChanged: () => byId("sidebar").hidden || conversations.list(),
    sent: (hadFiles) => {
      remember(page);
      composer.sent(hadFiles);
    },
    askedAgain: (question) => {
      if (composer.area.value === question.text) composer.fill(""); // it was given back
    },
    busy: (why) => {
      byId("hint").textContent = t(why);
    },
    runChanged: () => {
      composer.running(page.chat.isRunning);
      transcript.drawAll();
    },
    ended: (node) => {
      transcript.redraw(node);
      speak(node);
      restoreUnsent(page, node);
      showContext(page);
    },
  };
}

/** The screen reader hears that the answer is there, not every token of it. */
function speak(node) {
  const words = { done: "spoken_done", stopped: "spoken_stopped", failed: "spoken_failed" };
  byId("spoken").textContent = t(words[node.state] ?? "spoken_done", { count: count(node.text) });
}

/** A question that failed before a word of its answer goes back into the box, if that is free. */
function restoreUnsent(page, node) {
  if (node.state !== "failed" || node.text || page.composer.area.value) return;
  const question = page.chat.conversation.nodes[node.parent];
  if (question && !question.files?.length) page.composer.fill(question.text);
}

// -- drawing what does not depend on the conversation ------------------------------------------------

function drawWords(page) {
  for (const node of document.querySelectorAll("[data-t]")) node.textContent = t(node.dataset.t);
  for (const node of document.querySelectorAll("[data-t-label]")) {
    node.setAttribute("aria-label", t(node.dataset.tLabel));
    if (node.tagName === "BUTTON") node.title = t(node.dataset.tLabel);
  }
  byId("language").textContent = document.documentElement.lang === "en" ? "中文" : "EN";
  page.status.draw();
  page.conversations.draw();
  page.api.draw();
  drawSettings(page.settings);
  drawEffort(page.settings);
  drawEmpty(page);
  page.composer.dress();
  page.transcript.drawAll();
  showContext(page);
}

function drawEmpty(page) {
  const place = byId("empty");
  const card = page.status.now?.model;
  const examples = ["example_1", "example_2", "example_3", "example_4"].map((key) => {
    const chip = el("button", { type: "button", className: "example" }, t(key));
    chip.addEventListener("click", () => {
      page.composer.fill(t(key));
      page.composer.area.focus();
    });
    return chip;
  });
  place.replaceChildren(el("h1", {}, card?.id ?? t("welcome")), el("p", {}, t("welcome_more")),
    el("div", { className: "examples" }, ...examples));
}

function showContext(page) {
  drawContext(page.chat, page.settings.contextLength);
  page.clip.place();
}

function statusChanged(page, now, before) {
  if (now && before && now.boot !== before.boot) {
    // Another process: Gradio's session is gone, and the script may be another version.
    page.chat.leave();
    location.reload();
    return;
  }
  const card = now?.model;
  page.settings.shownModel = card?.id ?? "";
  page.settings.contextLength = card?.context_length ?? 0;
  page.composer.sees = card?.capabilities.vision ?? null;
  const efforts = [...(card?.capabilities.efforts ?? [])];
  if (efforts.join() !== page.settings.efforts.join()) {
    page.settings.efforts = efforts;
    drawEffort(page.settings);
  }
  if (card && page.drawnFor !== card.id) {
    page.drawnFor = card.id;
    page.settings.makers = card.defaults ?? {};
    if (!byId("panel-settings").contains(document.activeElement)) drawSettings(page.settings);
    drawEmpty(page);
    page.api.refreshModel();
  }
  page.composer.drawNotices();
  page.models.draw();
  showContext(page);
  if (page.status.isLost && page.chat.isRunning) page.chat.lose("connection_lost");
}

/** An answer that has said nothing for a while: ask whether the server still works on it. */
async function watchRun(page) {
  const { run } = page.chat;
  const patience = page.chat.pending ? SLOWEST_START : SILENCE;
  if (!run || Date.now() - run.last < patience) return;
  await page.status.poll();
  const now = page.status.now;
  const isIdle = now?.ready && now.running + now.waiting === 0;
  if (page.chat.run === run && isIdle && Date.now() - run.last >= patience) {
    page.chat.lose("connection_lost");
  }
}

// -- parts of the page that move ----------------------------------------------------------------------

async function openConversation(page, id) {
  const found = id ? await page.store.get(id) : null;
  if (found) page.chat.open(found);
  else page.chat.startNew();
  remember(page);
  page.transcript.drawAll({ follow: true });
  page.composer.running(page.chat.isRunning);
  showContext(page);
  if (!byId("sidebar").hidden) {
    await page.conversations.list();
    if (matchMedia("(max-width: 899px)").matches) showSidebar(page, false);
  }
}

const remember = (page) => localStorage.setItem(LAST, page.chat.conversation.id);

/** `then` comes a moment after the box: amid its making Gradio would empty what is put into it. */
function whenBoxIsThere(then) {
  if (document.querySelector("#composer textarea")) {
    setTimeout(then);
    return;
  }
  const seen = new MutationObserver(() => {
    if (!document.querySelector("#composer textarea")) return;
    seen.disconnect();
    setTimeout(then);
  });
  seen.observe(document.body, { childList: true, subtree: true });
}

/** Gradio has drawn its blocks: the page moves into its place among them, the box into the page. */
function adopt(page) {
  const { scroller } = page.transcript;
  const top = scroller.scrollTop;
  page.composer.mount(() => byId("slot").append(byId("shell")));
  page.clip.mount(byId("composer"));
  scroller.scrollTop = top;
  document.documentElement.dataset.ready = "yes";
}

function showSidebar(page, isOpen, tab = null) {
  const sidebar = byId("sidebar");
  sidebar.hidden = !isOpen;
  byId("shell").classList.toggle("with-sidebar", isOpen);
  byId("open-sidebar").setAttribute("aria-expanded", String(isOpen));
  if (!isOpen) {
    byId("open-sidebar").focus();
    return;
  }
  if (tab) byId(`tab-${tab}`).click();
  page.conversations.list();
  sidebar.querySelector('[role="tab"][aria-selected="true"]').focus();
}

function bindSidebar(page) {
  byId("open-sidebar").addEventListener("click", () => showSidebar(page, byId("sidebar").hidden));
  byId("close-sidebar").addEventListener("click", () => showSidebar(page, false));
  byId("open-api").addEventListener("click", () => showSidebar(page, true, "api"));
  const list = byId("sidebar").querySelector('[role="tablist"]');
  for (const tab of list.querySelectorAll('[role="tab"]')) {
    tab.addEventListener("click", () => {
      for (const other of list.querySelectorAll('[role="tab"]')) {
        const isChosen = other === tab;
        other.setAttribute("aria-selected", String(isChosen));
        other.tabIndex = isChosen ? 0 : -1;
        byId(other.getAttribute("aria-controls")).hidden = !isChosen;
      }
    });
  }
  arrowKeys(list);
}

function bindHeader(page) {
  byId("new-chat").addEventListener("click", async () => {
    await openConversation(page, null);
    page.composer.area.focus();
  });
  bindLook(page.settings, () => drawWords(page));
}

function bindKeys(page) {
  page.composer.onarrowup = () => !page.chat.isRunning && page.transcript.editLast();
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || event.isComposing) return;
    if (page.chat.isRunning) page.chat.stop();
    else if (!byId("sidebar").hidden) showSidebar(page, false);
  });
}

start();
