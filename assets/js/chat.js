// The conversation: a tree whose siblings are versions, the turns asked of the server, the news
// that comes back. Knows no layout: it tells its `view` what changed.
//
// A turn travels as small as it can: the server remembers what this page has said (`synced`), and
// says "need_history" when it does not (it was restarted); then the whole path goes along once.

import { newId } from "./dom.js";
import { fileRecord, forServer, keepPictures, titleOf } from "./files.js";
import { Tabs } from "./tabs.js";

const SAVE_EVERY = 1500;
const LEFT = "page-left";
const ENDED = ["done", "stopped", "failed"];

export class Chat {
  constructor(store, settings, bridge) {
    this.store = store;
    this.settings = settings;
    this.bridge = bridge;
    this.view = null;
    this.synced = new Set();
    this.run = null; // {conversation, node, question, since, last}
    this.pending = null; // a turn to send when Gradio asks for it
    this.unheard = ""; // an answer that was stopped before the server had said anything of it
    this.cancelled = 0; // when that, or a running one, was last stopped
    this.saved = 0;
    this.tabs = new Tabs(this);
    this.startNew();
    bridge.onprepare = (box, turn, memory) => this.prepare(box, turn, memory);
    bridge.onbroken = () => this.#broken();
    bridge.onnews = (snapshot) => this.news(snapshot);
  }

  // -- the tree ----------------------------------------------------------------------------------

  startNew() {
    const now = Date.now();
    this.conversation = { id: newId(), title: "", created: now, updated: now, leaf: "", nodes: {} };
  }

  open(conversation) {
    this.#takeLeft(conversation);
    const running = this.run?.conversation;
    this.conversation = running?.id === conversation.id ? running : conversation;
    this.tabs.watch();
  }

  path(conversation = this.conversation, leaf = conversation.leaf) {
    const path = [];
    for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) {
      path.unshift(node);
    }
    return path;
  }

  versions(node) {
    return Object.values(this.conversation.nodes)
      .filter((other) => other.parent === node.parent && other.role === node.role)
      .sort((a, b) => a.time - b.time);
  }

  /** Show another version; what was said below it is shown again as it was left. */
  choose(node) {
    let leaf = node;
    for (;;) {
      const next = Object.values(this.conversation.nodes).filter((n) => n.parent === leaf.id);
      if (!next.length) break;
      leaf = next.reduce((a, b) => ((b.seen ?? b.time) > (a.seen ?? a.time) ? b : a));
    }
    for (const shown of this.path(this.conversation, leaf.id)) shown.seen = Date.now();
    this.conversation.leaf = leaf.id;
    this.save();
    this.view.drawAll();
  }

  #add(node) {
    const whole = { id: newId(), time: Date.now(), text: "", state: "done", ...node };
    this.conversation.nodes[whole.id] = whole;
    this.conversation.leaf = whole.id;
    return whole;
  }

  /** The page goes while an answer is written: the database may be too slow, this is not. */
  leave() {
    if (!this.run) return;
    const { id, text, reasoning } = this.run.node;
    localStorage.setItem(LEFT, JSON.stringify({ id, text, reasoning, state: "stopped" }));
    this.tabs.tell(this.run, { state: "stopped" });
  }

  #takeLeft(conversation) {
    const left = JSON.parse(localStorage.getItem(LEFT) ?? "null");
    const node = left && conversation.nodes[left.id];
    if (!node) return;
    localStorage.removeItem(LEFT);
    if (node.state === "running") Object.assign(node, left);
  }

  async save(conversation = this.conversation) {
    if (!Object.keys(conversation.nodes).length) return;
    this.saved = Date.now();
    await this.store.put(conversation);
    this.view?.listChanged();
  }

  // -- other tabs --------------------------------------------------------------------------------

  /** The answers of this conversation that are being written, but not by this tab. */
  foreign() {
    return Object.values(this.conversation.nodes)
      .filter((node) => node.state === "running" && node.id !== this.run?.node.id);
  }

  /** Another tab tells of its answer. Who was at the end of the conversation goes along. */
  hear({ conversation: id, question, answer }) {
    if (id !== this.conversation.id) {
      if (answer.state !== "running") this.view.listChanged();
      return;
    }
    if (answer.id === this.run?.node.id) return;
    const { nodes, leaf } = this.conversation;
    const before = nodes[answer.id]?.state;
    nodes[question.id] ??= question;
    nodes[answer.id] = answer;
    this.synced.delete(answer.id);
    if (!before && [question.parent, question.id].includes(leaf)) this.conversation.leaf = answer.id;
    if (before === answer.state) this.view.grow(answer, null);
    else this.view.runChanged();
  }

  /** Nobody writes it any more. */
  giveUp(node) {
    node.state = "stopped";
    this.view.runChanged();
  }

  // -- asking ------------------------------------------------------------------------------------

  get isRunning() {
    return this.run !== null;
  }

  /** Whether something may be asked now; while an answer is written the reader is told why not. */
  isFree() {
    const isElsewhere = this.conversation.nodes[this.conversation.leaf]?.state === "running";
    if (this.isRunning) this.view.busy("still_running");
    else if (isElsewhere) this.view.busy("elsewhere");
    return !this.isRunning && !isElsewhere;
  }

  /** A new question of words alone. It goes out once Gradio is there to take it. */
  say(text) {
    if (!text.trim() || !this.isFree()) return;
    const question = this.#question(text, []);
    this.#send({ answer: this.run.node.id, question: question.id, parent: question.parent, text });
  }

  /** Another answer to the same question, beside the first. */
  retry(answer) {
    this.#ask(this.conversation.nodes[answer.parent], {});
  }

  /** The question said otherwise: a sibling, with the same files, answered. */
  edit(question, text) {
    if (!this.isFree()) return;
    const node = this.#add({ role: "user", parent: question.parent, text, files: question.files });
    const files = question.files?.length ? question.id : "";
    this.#ask(node, { parent: question.parent, text, keep_files_of: files });
  }

  /** The answer put into other words by the reader: a version, not sent to the model. */
  rewrite(answer, text) {
    const { role, parent, files } = answer;
    this.#add({ role, parent, files, text, rewritten: true });
    this.save();
    this.view.drawAll();
  }

  /** Go on where an answer was cut. */
  goOn(answer) {
    if (!this.isFree()) return;
    answer.state = "running";
    answer.error = null;
    this.#begin(answer);
    this.#send({ answer: answer.id, question: answer.parent, continues: answer.text });
  }

  /** Answer the question again, with the conversation read from `first` on. */
  readFrom(first, answer) {
    if (!this.isFree()) return;
    this.conversation.nodes[answer.parent].first = first.id;
    this.retry(answer);
  }

  /** The first message that the model reads, where earlier ones no longer fit; else undefined. */
  first(path = this.path()) {
    const cut = path.findLast((node) => node.first);
    return path.find((node) => node.id === cut?.first);
  }

  #ask(question, said) {
    if (!this.isFree()) return;
    const answer = this.#add({ role: "assistant", parent: question.id, state: "running" });
    this.#begin(answer);
    this.view.askedAgain(question);
    this.#send({ answer: answer.id, question: question.id, ...said });
  }

  #begin(node) {
    const now = Date.now();
    this.run = { conversation: this.conversation, node, since: now, last: now, turn: null };
    this.conversation.updated = node.at = now;
    this.save();
    this.tabs.tell(this.run);
    this.view.drawAll({ follow: true });
    this.view.runChanged();
  }

  /** Have Gradio ask for `turn`: its event takes it from here in prepare(). */
  #send(turn) {
    this.pending = turn;
    const knock = () => {
      if (this.pending !== turn) return;
      this.bridge.slot?.trigger("submit");
      setTimeout(knock, 300);
    };
    knock();
  }

  /** Called by Gradio with the composer's value; returns what goes to the server. */
  async prepare(box, _turn, memory) {
    if (this.pending) {
      const turn = this.pending;
      this.pending = null;
      return [{ text: "", files: [] }, this.#orNothing(await this.#whole(turn)), memory];
    }
    const text = box?.text ?? "";
    const files = box?.files ?? [];
    if ((!text.trim() && !files.length) || !this.isFree()) {
      return [{ text: "", files: [] }, { noop: true }, memory];
    }
    const question = this.#question(text, files);
    const kept = this.#keepPictures(question, files);
    const { id, parent } = question;
    const whole = await this.#whole({ answer: this.run.node.id, question: id, parent, text });
    kept.then(() => this.save(this.run?.conversation ?? this.conversation));
    return [{ text: "", files }, this.#orNothing(whole), memory];
  }

  /** The turn, unless it was stopped while it was put together. */
  #orNothing(turn) {
    return this.run?.node.id === turn.answer ? turn : { noop: true };
  }

  #question(text, files) {
    const parent = this.#whereToGoOn();
    const question = this.#add({ role: "user", parent, text, files: files.map(fileRecord) });
    this.conversation.title ||= titleOf(text, files);
    this.#begin(this.#add({ role: "assistant", parent: question.id, state: "running" }));
    this.view.sent(files.length > 0);
    return question;
  }

  /** Below the last answer; where that failed before a word, beside its question: a question the
   * model could not take must not stand in the way of the next. */
  #whereToGoOn() {
    const { leaf, nodes } = this.conversation;
    const last = nodes[leaf];
    return last?.state === "failed" && !last.text ? nodes[last.parent].parent : leaf;
  }

  async #whole(turn) {
    if (this.run) Object.assign(this.run, { turn, last: Date.now() });
    const first = this.first(this.path(this.conversation, turn.question))?.id;
    const options = this.settings.options();
    return { ...turn, first, options, history: await this.#history(turn) };
  }

  /** The nodes the server lacks, of those that lead to the question (and the one it was edited
   * from). The question itself goes as `text` when it is new. */
  async #history(turn) {
    const { nodes } = this.run?.conversation ?? this.conversation;
    const path = this.path({ nodes }, turn.question);
    if (turn.text !== undefined) path.pop();
    if (turn.keep_files_of) path.push(nodes[turn.keep_files_of]);
    const missing = path.filter((node) => !this.synced.has(node.id));
    return Promise.all(missing.map((node) => this.#forServer(node)));
  }

  async #forServer(node) {
    this.synced.add(node.id);
    const files = await forServer(node.files ?? [], this.store);
    return { id: node.id, parent: node.parent, role: node.role, text: node.text, files };
  }

  async #keepPictures(question, files) {
    await keepPictures(question.files, files, this.store);
    this.view.redraw(question);
  }

  // -- answers -----------------------------------------------------------------------------------

  news(snapshot) {
    const { run } = this;
    if (!run || snapshot?.turn !== run.node.id) {
      if (snapshot && snapshot.turn === this.unheard) this.#cancel();
      return;
    }
    run.last = Date.now();
    run.isHeard = true;
    if (snapshot.phase === "need_history") {
      this.synced.clear();
      const { turn } = run;
      this.#send({ ...turn, ...this.#textAgain(turn) });
      return;
    }
    this.#take(run, snapshot);
    if (ENDED.includes(snapshot.phase)) this.#end(snapshot.phase);
    else if (Date.now() - this.saved > SAVE_EVERY) this.save(run.conversation);
  }

  // The files of a new question were uploaded with the first try; now they come from the browser.
  #textAgain(turn) {
    const question = this.run.conversation.nodes[turn.question];
    return question.files?.length ? { text: undefined, keep_files_of: "" } : {};
  }

  #take(run, snapshot) {
    const { node } = run;
    const { text, reasoning, calls, stats, notes, error, cut } = snapshot;
    Object.assign(node, { text, reasoning, calls, stats, notes, error, cut });
    node.at = Date.now();
    node.phase = snapshot.phase;
    node.queue = snapshot.queue;
    node.thought = snapshot.thought_seconds;
    if (snapshot.phase === "thinking") run.thinkingSince ??= Date.now();
    if (snapshot.files?.length) this.#takeFiles(run, snapshot.files);
    this.synced.add(node.parent);
    this.tabs.grown(run);
    this.view.grow(node, run);
  }

  #takeFiles(run, files) {
    const question = run.conversation.nodes[run.node.parent];
    if (run.filesTaken) return;
    run.filesTaken = true;
    question.files = files.map((file, i) => ({ ...question.files?.[i], ...file }));
    this.view.redraw(question);
  }

  #end(state) {
    const { run } = this;
    const { conversation, node } = run;
    node.state = state;
    node.model = this.settings.shownModel;
    delete node.phase;
    delete node.queue;
    this.run = null;
    this.pending = null;
    if (state === "done") this.synced.add(node.id);
    else this.synced.delete(node.id);
    conversation.updated = node.at = Date.now();
    this.save(conversation);
    this.tabs.tell(run);
    this.view.ended(node);
    this.view.runChanged();
  }

  stop() {
    const { run, pending } = this;
    if (!run) return;
    if (run.isHeard) this.#cancel();
    // Gradio can cancel only what the server has taken: its first news will be the time.
    else if (run.turn && !pending) this.unheard = run.node.id;
    this.#end("stopped");
  }

  #cancel() {
    this.unheard = "";
    this.cancelled = Date.now();
    this.bridge.slot?.trigger("stop");
  }

  /** Gradio says so of what was cancelled, too. */
  #broken() {
    if (!this.pending && Date.now() - this.cancelled > 1000) this.lose("connection_lost");
  }

  /** The answer will not come: the server is gone, was restarted, or refused the request. */
  lose(code) {
    const { run } = this;
    if (!run) return;
    run.node.error = { code, message: "" };
    this.synced.clear();
    this.#end("failed");
  }
}
