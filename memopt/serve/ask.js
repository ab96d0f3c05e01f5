// What the page asks the server with, and how it writes elements and numbers.

export const KEY = "memopt-key"; // of sessionStorage: where the API key is

export const $ = (selector, from = document) => from.querySelector(selector);

/** Return a new element with text and attributes. */
export function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

/** An answer that is no answer, in words. */
class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Return the server's response; throws Refused with a sentence for everything else. */
export async function ask(path, body, signal) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Refused(response.status, sentence(response, told.error?.message ?? told.error));
}

function sentence(response, said) {
  const detail = said ? `: ${said}` : "";
  const wait = response.headers.get("retry-after");
  if (response.status === 401) {
    const key = sessionStorage.getItem(KEY);
    return key ? "The server does not know this API key." : "The server asks for an API key.";
  }
  if (response.status === 429) return `Too much at once; try again in ${wait ?? 1} s${detail}`;
  if (response.status >= 500) return `The server could not answer (${response.status})${detail}`;
  return `The server refused this (${response.status})${detail}`;
}

// --- numbers ---

/** Return a number with about three digits, in the reader's own notation. */
export function digits(value, most = 3) {
  return value.toLocaleString(undefined, {
    maximumSignificantDigits: Math.abs(value) >= 100 ? undefined : most,
    maximumFractionDigits: Math.abs(value) >= 100 ? 0 : undefined,
  });
}

export const milliseconds = (value) => `${digits(value)} ms`;
export const plural = (count, one, more) => `${count} ${count === 1 ? one : more}`;

export function duration(seconds) {
  if (seconds < 120) return `${seconds} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
  return `${Math.floor(seconds / 86400)} days`;
}

export function megabytes(value) {
  return value < 1000 ? `${Math.round(value)} MB` : `${digits(value / 1000)} GB`;
}

/** Return a new element of a drawing. */
export function shape(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
