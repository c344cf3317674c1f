// Updates the pages live. The console works without this script.

const base = document.documentElement.dataset.base;
const LEAST_PAUSE = 1500; // milliseconds between two refreshes
const LONGEST_PAUSE = 30000; // milliseconds until a refresh without any event

signInByLink();
addEventListener("hashchange", signInByLink);
keepZone();
guardDoubleSubmit();
offerCopies();
goLive();

function signInByLink() {
  const form = document.getElementById("sign-in");
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!form || !token) return;
  history.replaceState(null, "", location.pathname + location.search); // so that the token does not stay in the browser's history
  form.elements.secret.value = token;
  form.requestSubmit();
}

function keepZone() {
  if (document.cookie.includes("followups_zone=")) return;
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (zone) document.cookie = `followups_zone=${zone}; path=/; max-age=31536000; samesite=lax`;
}

function guardDoubleSubmit() {
  document.addEventListener("submit", (event) => {
    if (event.target.dataset.sent) event.preventDefault();
    event.target.dataset.sent = "yes";
  });
  addEventListener("pageshow", () => {
    for (const form of document.querySelectorAll("form[data-sent]")) delete form.dataset.sent;
  });
}

function offerCopies() {
  for (const button of document.querySelectorAll("[data-copy]")) {
    button.hidden = !navigator.clipboard;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copy).textContent);
      button.textContent += " ✓";
    });
  }
}

function goLive() {
  const live = document.getElementById("live");
  if (!live || !document.querySelector("[data-region]")) return;
  const status = live.querySelector("[role=status]");
  const pause = live.querySelector("button");
  let source = null;
  let paused = false;
  let due = 0;
  let timer = null;

  live.hidden = false;
  pause.addEventListener("click", () => {
    paused = !paused;
    pause.textContent = paused ? pause.dataset.resume : pause.dataset.pause;
    status.textContent = paused ? live.dataset.paused : live.dataset.live;
    if (paused) close();
    else open();
  });
  document.addEventListener("visibilitychange", () => {
    if (document.hidden) close();
    else if (!paused) open();
  });
  addEventListener("pagehide", close);
  if (!document.hidden) open();

  function open() {
    close();
    const followUp = location.pathname.match(/\/follow-ups\/([0-9a-f-]{36})$/);
    source = new EventSource(`${base}/stream${followUp ? `?follow_up=${followUp[1]}` : ""}`);
    source.addEventListener("open", () => {
      status.textContent = live.dataset.live;
      schedule(0);
    });
    source.addEventListener("change", () => schedule(LEAST_PAUSE));
    source.addEventListener("signed-out", () => stop(live.dataset.out));
    source.addEventListener("error", () => {
      if (!status.dataset.stale) say(live.dataset.stale.replace("{time}", new Date().toLocaleTimeString()));
      status.dataset.stale = "yes";
      // The browser stops reconnecting after an error response, so open a new connection later.
      if (source && source.readyState === EventSource.CLOSED) setTimeout(() => !paused && !document.hidden && open(), 5000);
    });
  }

  function close() {
    if (source) source.close();
    source = null;
    clearTimeout(timer);
    timer = null;
  }

  function stop(why) {
    paused = true;
    close();
    say(why);
    pause.hidden = true;
  }

  function say(words) {
    status.textContent = words;
  }

  function schedule(wait) {
    const at = Math.max(Date.now() + wait, due);
    clearTimeout(timer);
    timer = setTimeout(refresh, at - Date.now());
  }

  async function refresh() {
    due = Date.now() + LEAST_PAUSE;
    try {
      const answer = await fetch(location.href, { headers: { accept: "text/html" }, redirect: "manual" });
      if (answer.type === "opaqueredirect" || answer.status === 401) return stop(live.dataset.out);
      if (!answer.ok) throw new Error(answer.status);
      if (paused) return; // paused while the request was running
      const page = new DOMParser().parseFromString(await answer.text(), "text/html");
      for (const region of document.querySelectorAll("[data-region]")) {
        const fresh = page.querySelector(`[data-region="${region.dataset.region}"]`);
        if (fresh) replace(region, fresh);
      }
      delete status.dataset.stale;
      say(live.dataset.live);
    } catch {
      if (paused) return;
      if (!status.dataset.stale) say(live.dataset.stale.replace("{time}", new Date().toLocaleTimeString()));
      status.dataset.stale = "yes";
    }
    if (source) schedule(LONGEST_PAUSE);
  }

  function replace(region, fresh) {
    if ("rows" in region.dataset) return replaceRows(region, fresh);
    if (!isBusy(region) && region.innerHTML !== fresh.innerHTML) region.replaceChildren(...fresh.childNodes);
  }

  // Update existing rows in place and only offer new rows, so that no row moves under the pointer.
  function replaceRows(region, fresh) {
    const rows = [...fresh.querySelectorAll("tbody tr[id]")];
    const known = rows.filter((row) => document.getElementById(row.id));
    for (const row of known) {
      const old = document.getElementById(row.id);
      if (!isBusy(old) && old.innerHTML !== row.innerHTML) old.replaceChildren(...row.childNodes);
    }
    const number = rows.length - known.length;
    let offer = region.querySelector("button[data-offer]");
    if (!number || new URLSearchParams(location.search).has("after")) {
      if (offer) offer.remove();
      return;
    }
    if (!offer) {
      offer = document.createElement("button");
      offer.type = "button";
      offer.dataset.offer = "yes";
      offer.className = "quiet";
      offer.addEventListener("click", () => location.reload());
      region.prepend(offer);
    }
    offer.textContent = live.dataset.new.replace("{number}", number);
  }

  function isBusy(region) {
    const selection = getSelection();
    if (region.contains(document.activeElement) && document.activeElement !== document.body) return true;
    if (selection && !selection.isCollapsed && region.contains(selection.anchorNode)) return true;
    for (const field of region.querySelectorAll("input, textarea, select")) {
      if (field.type === "checkbox" || field.type === "radio" ? field.checked !== field.defaultChecked : field.value !== field.defaultValue && field.tagName !== "SELECT") return true;
    }
    return Boolean(region.querySelector("dialog[open], details[open]"));
  }
}
