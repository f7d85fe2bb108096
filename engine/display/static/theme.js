// Apply the chosen theme before the page is drawn. Without a choice, the system's theme applies.
"use strict";

const THEMES = ["", "light", "dark"];
const SYSTEM = matchMedia("(prefers-color-scheme: dark)");
let chosen = readTheme();

function applyTheme() {
  document.documentElement.dataset.theme = chosen || (SYSTEM.matches ? "dark" : "light");
  document.dispatchEvent(new Event("themechange"));
}

function readTheme() {
  try {
    return localStorage.getItem("theme") ?? "";
  } catch {
    return ""; // storage is disabled
  }
}

function switchTheme() {
  chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
  try {
    localStorage.setItem("theme", chosen);
  } catch {
    // The choice lasts until the page is closed.
  }
  applyTheme();
  return chosen || "system";
}

applyTheme();
SYSTEM.addEventListener("change", applyTheme);
window.switchTheme = switchTheme;
