// Small pieces of DOM: making elements, icons, copying, saving a file. No state.

export const byId = (id) => document.getElementById(id);

/** An element. Properties are set as properties, `data`, `aria` and `on` as their own kind. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "data") Object.assign(node.dataset, value);
    else if (name === "aria") for (const key in value) node.setAttribute(`aria-${key}`, value[key]);
    else if (name === "on") for (const type in value) node.addEventListener(type, value[type]);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

const PATHS = {
  close: "M6 6l12 12M18 6L6 18",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  check: "M5 13l4 4L19 7",
  retry: "M4 12a8 8 0 1 0 2.5-5.8M4 4v5h5",
  edit: "M4 20h4L19 9l-4-4L4 16z",
  left: "M15 6l-6 6 6 6",
  right: "M9 6l6 6-6 6",
  trash: "M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13",
  save: "M12 4v11M7 11l5 5 5-5M5 20h14",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4",
  file: "M7 3h7l4 4v14H7zM14 3v4h4",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

/** A button that is an icon with a name. */
export function iconButton(name, label, onclick, properties = {}) {
  return el(
    "button",
    { type: "button", className: "icon", title: label, aria: { label }, on: { click: onclick },
      ...properties },
    icon(name),
  );
}

/** Put `text` on the clipboard; true when that worked. Inside a frame the API may be denied. */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = el("textarea", { value: text, className: "unseen", readOnly: true });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Show on the button that it worked, for a moment. */
export function showDone(button, words, done = true) {
  const before = [...button.childNodes];
  const isIcon = button.classList.contains("icon");
  button.replaceChildren(isIcon ? icon(done ? "check" : "close") : words);
  setTimeout(() => button.replaceChildren(...before), 1500);
}

export function saveFile(name, text, type = "application/json") {
  const url = URL.createObjectURL(new Blob([text], { type }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

export const newId = () => crypto.randomUUID?.() ?? randomId();

// randomUUID exists only where the page came over https or from this machine.
function randomId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return [...bytes].map((b) => b.toString(16).padStart(2, "0")).join("");
}
