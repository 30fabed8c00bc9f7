"use strict";
// Requests to the server that this page came from.

class ApiError extends Error {
  // word: the sentence for it in words
  constructor(word, message = "", value = "") {
    super(message);
    this.word = word;
    this.value = value;
  }
}

const BY_STATUS = { 401: "wantsKey", 403: "forbidden", 404: "noModel", 429: "busy", 504: "slow" };

function errorOf(status, body, response) {
  const { message = "", code = "" } = body?.error ?? {};
  const seconds = response?.headers.get("retry-after") ?? "1";
  if (code === "context_length_exceeded") return new ApiError("tooLong", message);
  if (code === "timeout") return new ApiError("slow", message);
  return new ApiError(BY_STATUS[status] ?? (status >= 500 ? "broken" : "refused"), message, seconds);
}

class Api {
  constructor(store) {
    this.store = store;
  }

  // Return the response to a request. Throws ApiError; AbortError where `signal` says stop.
  async ask(path, body, signal) {
    const headers = { "content-type": "application/json" };
    if (this.store.key) headers.authorization = `Bearer ${this.store.key}`;
    const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
    let response;
    try {
      response = await fetch(path, { headers, signal, ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("offline", error.message);
    }
    if (response.ok) return response;
    throw errorOf(response.status, await response.json().catch(() => null), response);
  }

  async models() {
    return (await (await this.ask("v1/models")).json()).data;
  }

  // Return the newest turns of a chat that fit into the context and leave room for an answer, as eval.py does: what is
  // sent, and how many turns are left out. The last question is always sent.
  async fitting(model, system, turns, most, signal) {
    const first = system ? [{ role: "system", content: system }] : [];
    for (let gone = 0; ; gone += 1) {
      const messages = [...first, ...turns.slice(2 * gone)];
      if (turns.length - 2 * gone <= 2) return { messages, gone };
      try {
        const { count, max_model_len: context } = await (await this.ask("tokenize", { model, messages }, signal)).json();
        if (count + Math.min(most, Math.floor(context / 4)) <= context) return { messages, gone };
      } catch (error) {
        if (error.word !== "tooLong") throw error;
      }
    }
  }

  // Yield the events of a stream. Throws ApiError for an error in it, and where it ends too early.
  async* events(path, body, signal) {
    const response = await this.ask(path, { ...body, stream: true, stream_options: { include_usage: true } }, signal);
    const decoder = new TextDecoder();
    const reader = response.body.getReader();
    let waiting = "";
    for (;;) {
      let part;
      try {
        part = await reader.read();
      } catch (error) {
        if (error.name === "AbortError") throw error;
        throw new ApiError("brokeOff", error.message);
      }
      if (part.done) throw new ApiError("brokeOff");
      const lines = (waiting + decoder.decode(part.value, { stream: true })).split("\n\n");
      waiting = lines.pop();
      for (const line of lines) {
        const data = line.slice("data: ".length);
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw errorOf(500, event);
        yield event;
      }
    }
  }

  // Yield what is new of an answer: { text, tokens, reason, usage, timings }. input: { messages } of a chat, or { prompt }.
  async* answer(input, settings, alternatives, signal) {
    const chat = "messages" in input;
    const asked = chat ? { logprobs: true, top_logprobs: alternatives } : { logprobs: alternatives };
    const body = { ...input, ...settings, ...(alternatives ? asked : {}) };
    for await (const event of this.events(chat ? "v1/chat/completions" : "v1/completions", body, signal)) {
      const choice = event.choices[0];
      yield {
        text: (chat ? choice?.delta.content : choice?.text) ?? "",
        tokens: chat ? chatTokens(choice?.logprobs) : completionTokens(choice?.logprobs),
        reason: choice?.finish_reason,
        usage: event.usage,
        timings: event.timings,
      };
    }
  }
}

// Tokens of an answer: { name, bytes, logprob, top: [[name, logprob], ...] }.
function chatTokens(logprobs) {
  return (logprobs?.content ?? []).map((entry) => ({
    name: entry.token, bytes: entry.bytes, logprob: entry.logprob,
    top: entry.top_logprobs.map((each) => [each.token, each.logprob]),
  }));
}

function completionTokens(logprobs) {
  return (logprobs?.tokens ?? []).map((name, i) => ({
    name, bytes: bytesOf(name), logprob: logprobs.token_logprobs[i],
    top: Object.entries(logprobs.top_logprobs[i] ?? {}).sort((a, b) => b[1] - a[1]),
  }));
}

// Return the bytes of a token from its name, which escapes those of half a character.
function bytesOf(name) {
  if (!name.startsWith("bytes:")) return [...new TextEncoder().encode(name)];
  return [...name.matchAll(/\\x([0-9a-f]{2})/g)].map((match) => parseInt(match[1], 16));
}

const SPECIAL = /^<[^<>]+>$|^\[[A-Z_]+\]$/; // a token that is no text, such as <|user|>

// Return for each character of a text the number of the token that it begins in; null where they do not fit together.
function ownersOf(text, tokens) {
  for (const skipped of [false, true]) {
    const ofByte = tokens.flatMap((token, i) => (skipped && SPECIAL.test(token.name) ? [] : token.bytes.map(() => i)));
    const bytes = tokens.flatMap((token) => (skipped && SPECIAL.test(token.name) ? [] : token.bytes));
    const whole = new TextDecoder("utf-8", { ignoreBOM: true }).decode(new Uint8Array(bytes));
    if (tokens.length && whole.startsWith(text)) return owners(text, bytes, ofByte);
  }
  return null;
}

function owners(text, bytes, ofByte) {
  const found = [];
  let at = 0;
  for (const letter of text) {
    for (let unit = 0; unit < letter.length; unit += 1) found.push(ofByte[at]);
    const code = letter.codePointAt(0);
    const size = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    at += letter === "\ufffd" ? replaced(bytes, at) : size;
  }
  return found;
}

// Return how many bytes at a place are shown as one replacement character.
function replaced(bytes, at) {
  const decoder = new TextDecoder();
  const isOne = (n) => at + n <= bytes.length && decoder.decode(new Uint8Array(bytes.slice(at, at + n))) === "\ufffd";
  return [3, 2].find(isOne) ?? 1;
}
