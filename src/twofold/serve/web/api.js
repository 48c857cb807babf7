// The server's HTTP API as the page uses it: /v1/models, and /v1/chat/completions as a stream of server-sent events.
// Every failure is an ApiError whose `kind` has a plain sentence in strings.js. Only this origin is ever asked.

/** What went wrong: `kind` names a text error_<kind>; `message` is the server's own; `wait` seconds, where it says so. */
export class ApiError extends Error {
  constructor(kind, message = "", wait = null) {
    super(message);
    this.kind = kind;
    this.wait = wait;
  }
}

const KINDS = {
  400: "refused",
  401: "key",
  403: "key",
  404: "missing",
  408: "late",
  413: "large",
  422: "refused",
  429: "busy",
  503: "away",
  504: "late",
};

const TYPES = { rate_limit_error: "busy", service_unavailable_error: "away", invalid_request_error: "refused" };

/** The models on offer: the `data` of /v1/models. */
export async function listModels(key) {
  const response = await ask("v1/models", { headers: headers(key) });
  return (await response.json()).data || [];
}

/** Sends a chat request and calls `onChunk` with each chunk's JSON until the stream says that it is done. */
export async function streamChat(body, key, signal, onChunk) {
  const response = await ask("v1/chat/completions", {
    method: "POST",
    headers: { ...headers(key), "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const events = new EventReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      for (const data of done ? events.end() : events.feed(value)) {
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw inStream(chunk.error);
        onChunk(chunk);
      }
      if (done) throw new ApiError("cut");
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("cut");
  }
}

function headers(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, cache: "no-store" });
  } catch (error) {
    throw error.name === "AbortError" ? error : new ApiError("offline");
  }
  if (!response.ok) throw await failed(response);
  return response;
}

async function failed(response) {
  let message = "";
  try {
    message = String((await response.json()).error?.message ?? "");
  } catch {
    // Not JSON: an answer of something between the page and the server.
  }
  const wait = Number(response.headers.get("Retry-After")) || null;
  return new ApiError(KINDS[response.status] || (response.status < 500 ? "refused" : "server"), message, wait);
}

/** A failure after the first byte: the status is sent, so the error's type or code has to say what it was. */
function inStream({ type, code, message }) {
  return new ApiError(TYPES[type] || KINDS[Number(code)] || "server", String(message ?? ""));
}

/** Server-sent events from text in pieces: gives the data of each whole event. Also reads CRLF and comments. */
export class EventReader {
  constructor() {
    this.rest = "";
    this.data = [];
  }

  feed(text) {
    const lines = (this.rest + text).split("\n");
    this.rest = lines.pop();
    return lines.flatMap((line) => this.line(line.replace(/\r$/, "")));
  }

  end() {
    return [...this.feed("\n"), ...this.line("")];
  }

  line(line) {
    if (line.startsWith("data:")) this.data.push(line.slice(5).replace(/^ /, ""));
    if (line !== "" || !this.data.length) return [];
    const whole = this.data.join("\n");
    this.data = [];
    return [whole];
  }
}
