// Requests to the local server.
import { element } from "./element.js";

export { element };

// Send a request, and return the JSON object of the reply.
export async function request(action, body = {}) {
  const response = await send(action, body);
  return response.json();
}

// Send a request whose reply is a JSON object followed by arrays of 64-bit floats.
export async function requestNumbers(action, body) {
  const buffer = await (await send(action, body)).arrayBuffer();
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  let offset = 4 + length;
  const arrays = header.lengths.map((count) => {
    const array = new Float64Array(buffer, offset, count);
    offset += 8 * count;
    return array;
  });
  return { header, arrays };
}

// Send a request whose reply is a file, and save the file.
export async function download(action, body) {
  const response = await send(action, body);
  const name = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition"))?.[1];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(await response.blob());
  link.download = name ?? "curves";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function send(action, body) {
  let response;
  try {
    response = await fetch(`api/${action}`, {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body),
    });
  } catch {
    throw new Error("The server does not answer. Start `onecycle ui` again.");
  }
  if (!response.ok) {
    const reply = await response.json().catch(() => ({}));
    throw new Error(reply.error ?? `The server answered with status ${response.status}.`);
  }
  return response;
}

// Return a function that runs `task` at most once at a time, and again if it was called meanwhile.
export function coalesce(task) {
  let isRunning = false;
  let isPending = false;
  return async function run() {
    if (isRunning) {
      isPending = true;
      return;
    }
    isRunning = true;
    try {
      do {
        isPending = false;
        await task();
      } while (isPending);
    } finally {
      isRunning = false;
    }
  };
}

// Return the nodes of a text in which `names` or ``names`` are shown as code.
export function formatText(text) {
  return text.split(/(``[^`]+``|`[^`]+`)/).map((part) =>
    part.startsWith("`") && part.length > 2 ? element("code", { textContent: part.replaceAll("`", "") }) : part,
  );
}
