// Conversations in the browser's own database. The server keeps none.
//
// A conversation is one record: {id, title, created, updated, leaf, draft, nodes: {id: node}}. A
// node is {id, parent, role, text, …}; siblings are versions. Pictures are records of their own.

const NAME = "chat-page";

const settled = (result) => (result instanceof IDBRequest ? request(result) : result);

function request(asked) {
  return new Promise((resolve, reject) => {
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => reject(asked.error);
  });
}

export class Store {
  /** Opens the database; where the browser forbids one (a private window), keeps to memory. */
  static async open() {
    const store = new Store();
    try {
      const opening = indexedDB.open(NAME, 1);
      opening.onupgradeneeded = () => {
        opening.result.createObjectStore("conversations", { keyPath: "id" });
        opening.result.createObjectStore("pictures");
      };
      store.database = await request(opening);
      store.database.onversionchange = () => store.database.close();
    } catch {
      store.memory = { conversations: new Map(), pictures: new Map() };
    }
    return store;
  }

  get isLasting() {
    return !this.memory;
  }

  async #do(name, mode, work) {
    if (this.memory) return work(new MemoryShelf(this.memory[name]));
    const transaction = this.database.transaction(name, mode);
    return settled(work(transaction.objectStore(name)));
  }

  /** All conversations, the latest first. */
  async list() {
    const all = await this.#do("conversations", "readonly", (shelf) => shelf.getAll());
    return all.sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.#do("conversations", "readonly", (shelf) => shelf.get(id));
  }

  /** Another tab may have written meanwhile: what was said there is taken in, not written over. */
  put(conversation) {
    return this.#do("conversations", "readwrite", async (shelf) => {
      takeIn(conversation.nodes, (await settled(shelf.get(conversation.id)))?.nodes ?? {});
      await settled(shelf.put(structuredClone(conversation)));
    });
  }

  async remove(id) {
    const conversation = await this.get(id);
    await this.#do("conversations", "readwrite", (shelf) => shelf.delete(id));
    for (const picture of picturesOf(conversation)) {
      await this.#do("pictures", "readwrite", (shelf) => shelf.delete(picture));
    }
  }

  picture(id) {
    return this.#do("pictures", "readonly", (shelf) => shelf.get(id));
  }

  putPicture(id, blob) {
    return this.#do("pictures", "readwrite", (shelf) => shelf.put(blob, id));
  }

  /** Everything as one JSON text, pictures included. */
  async export(ids = null) {
    const conversations = (await this.list()).filter((c) => !ids || ids.includes(c.id));
    const pictures = {};
    for (const id of conversations.flatMap(picturesOf)) {
      const blob = await this.picture(id);
      if (blob) pictures[id] = await dataAddress(blob);
    }
    return JSON.stringify({ format: "chat-page-1", conversations, pictures }, null, 1);
  }

  /** Put an export's conversations beside those here; returns how many. Throws on other files. */
  async import(text) {
    const given = JSON.parse(text);
    if (given.format !== "chat-page-1") throw new Error("format");
    const conversations = given.conversations.map(checked);
    for (const [id, address] of Object.entries(given.pictures ?? {})) {
      if (/^data:image\/(png|jpeg|webp|gif);base64,/.test(address)) {
        await this.putPicture(id, await (await fetch(address)).blob());
      }
    }
    for (const conversation of conversations) await this.put(conversation);
    return conversations.length;
  }
}

class MemoryShelf {
  constructor(map) {
    this.map = map;
  }
  getAll() {
    return [...this.map.values()].map((value) => structuredClone(value));
  }
  get(id) {
    return structuredClone(this.map.get(id));
  }
  put(value, id = value.id) {
    this.map.set(id, value);
  }
  delete(id) {
    this.map.delete(id);
  }
}

/** Nodes are only ever added, and answers only grow: of two that were written at once the longer. */
function takeIn(ours, theirs) {
  const age = (node) => node.at ?? 0;
  for (const [id, node] of Object.entries(theirs)) {
    const newer = ours[id] && (age(node) - age(ours[id]) || node.text.length - ours[id].text.length);
    if (!ours[id]) ours[id] = node;
    else if (newer > 0) Object.assign(ours[id], node);
  }
}

function picturesOf(conversation) {
  const nodes = Object.values(conversation?.nodes ?? {});
  return nodes.flatMap((node) => (node.files ?? []).map((f) => f.picture)).filter(Boolean);
}

// What a node may hold, by type. What a file brings besides is not taken: drawing relies on this.
const NODE = { role: "string", parent: "string", text: "string", reasoning: "string",
  state: "string", model: "string", first: "string", time: "number", seen: "number",
  thought: "number", cut: "boolean", rewritten: "boolean" };
const LISTS = {
  files: { name: "string", kind: "string", text: "string", note: "string", picture: "string",
    size: "number" },
  calls: { id: "string", name: "string", arguments: "string" },
  notes: { code: "string", model: "string" },
};
const STATS = { prompt_tokens: "number", completion_tokens: "number", cached_tokens: "number",
  reasoning_tokens: "number", tokens_per_second: "number", first_token_seconds: "number" };

function known(given, kinds) {
  const names = Object.keys(kinds).filter((name) => typeof given?.[name] === kinds[name]);
  return Object.fromEntries(names.map((name) => [name, given[name]]));
}

function checkedNode(given, id) {
  const node = { time: 0, parent: "", ...known(given, NODE), id };
  if (!["user", "assistant"].includes(node.role) || node.text === undefined) throw new Error("node");
  if (!["done", "failed"].includes(node.state)) node.state = "stopped";
  for (const [name, kinds] of Object.entries(LISTS)) {
    if (Array.isArray(given[name])) node[name] = given[name].map((part) => known(part, kinds));
  }
  if (given.stats) node.stats = known(given.stats, STATS);
  if (given.error) node.error = known(given.error, { code: "string", message: "string" });
  return node;
}

/** An imported conversation with only what we know, or an error. */
function checked(given) {
  const nodes = {};
  for (const [id, node] of Object.entries(given.nodes)) nodes[id] = checkedNode(node, id);
  for (const node of Object.values(nodes)) {
    let above = node;
    for (let steps = 0; above.parent; steps += 1) {
      above = nodes[above.parent];
      if (!above || steps > Object.keys(nodes).length) throw new Error("parent");
    }
  }
  if (typeof given.id !== "string") throw new Error("id");
  return {
    id: given.id,
    title: String(given.title ?? ""),
    created: Number(given.created) || Date.now(),
    updated: Number(given.updated) || Date.now(),
    leaf: nodes[given.leaf] ? given.leaf : "",
    nodes,
  };
}

export function dataAddress(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}
