// Apply the chosen theme before the page is drawn. Without a choice, the system's theme applies.
"use strict";

const THEMES = ["", "light", "dark"];

function applyTheme(theme) {
  const root = document.documentElement;
  if (theme) root.dataset.theme = theme;
  else delete root.dataset.theme;
}

function readTheme() {
  try {
    return localStorage.getItem("theme") ?? "";
  } catch {
    return ""; // storage is disabled
  }
}

function switchTheme() {
  const theme = THEMES[(THEMES.indexOf(readTheme()) + 1) % THEMES.length];
  try {
    localStorage.setItem("theme", theme);
  } catch {
    // The choice lasts until the page is closed.
  }
  applyTheme(theme);
  document.dispatchEvent(new Event("themechange"));
  return theme || "system";
}

applyTheme(readTheme());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
  document.dispatchEvent(new Event("themechange")),
);
window.switchTheme = switchTheme;
