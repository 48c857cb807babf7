// Runs before the first paint, so that the page never flashes in the wrong theme or is read in the wrong language.
// A classic script on purpose: modules run after parsing. Everything else is in app.js.
(() => {
  let prefs = {};
  try {
    prefs = JSON.parse(localStorage.getItem("twofold.prefs") || "{}");
  } catch {
    // Damaged settings are replaced by the defaults (prefs.js).
  }
  const root = document.documentElement;
  root.dataset.theme = ["light", "dark"].includes(prefs.theme) ? prefs.theme : "auto";
  const chosen = ["en", "zh"].includes(prefs.language) ? prefs.language : navigator.language || "en";
  root.lang = chosen.startsWith("zh") ? "zh-CN" : "en";
})();
