// What the browser keeps of a file that was attached, and what of it goes to the server again.

import { newId } from "./dom.js";
import { dataAddress } from "./store.js";

const LARGEST_PICTURE = 4_000_000;

export function fileRecord(file) {
  const isPicture = (file.mime_type ?? "").startsWith("image/");
  return { name: file.orig_name ?? "file", kind: isPicture ? "image" : "text", size: file.size,
    text: "" };
}

export function titleOf(text, files) {
  const line = text.trim().split("\n")[0] || files[0]?.orig_name || "";
  return line.length > 60 ? `${line.slice(0, 60)}…` : line;
}

/** A picture of at most 2048 pixels a side; small files stay as they are. */
async function shrunk(blob) {
  if (blob.size <= LARGEST_PICTURE) return blob;
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, 2048 / Math.max(bitmap.width, bitmap.height));
  const canvas = new OffscreenCanvas(bitmap.width * scale, bitmap.height * scale);
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.9 });
}

/** Pictures are kept in the browser: the server forgets them with the page. */
export async function keepPictures(records, files, store) {
  for (const [i, file] of files.entries()) {
    if (records[i].kind !== "image") continue;
    try {
      const blob = await shrunk(await (await fetch(file.url)).blob());
      records[i].picture = newId();
      await store.putPicture(records[i].picture, blob);
    } catch {
      records[i].note = "picture_not_kept";
    }
  }
}

/** The files of a message that the server no longer knows. */
export async function forServer(records, store) {
  const files = [];
  for (const file of records) {
    if (file.kind !== "image") files.push({ kind: file.kind, name: file.name, text: file.text });
    else if (file.picture) {
      const blob = await store.picture(file.picture);
      if (blob) files.push({ kind: "image", data: (await dataAddress(blob)).split(",")[1] });
    }
  }
  return files;
}
