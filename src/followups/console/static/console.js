// Makes the pages live. Everything works without it.

const base = document.documentElement.dataset.base;

signInByLink();
keepZone();
guardDoubleSubmit();

function signInByLink() {
  const form = document.getElementById("sign-in");
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!form || !token) return;
  history.replaceState(null, "", location.pathname + location.search); // so that the token stays in no history
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
    const form = event.target;
    if (form.dataset.sent) event.preventDefault();
    form.dataset.sent = "yes";
  });
  addEventListener("pageshow", () => document.querySelectorAll("form[data-sent]").forEach((form) => delete form.dataset.sent));
}
