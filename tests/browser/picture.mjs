// The first screens of a report as a PNG, for the README.
// Run: NODE_MODULES=DIR node tests/browser/picture.mjs out/int8/report.html docs/report.png
import { createRequire } from "node:module";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.env.NODE_MODULES ?? process.cwd(), "x.js"));
const { chromium } = require("playwright-core");
const [page, png] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox", "--disable-gpu"] });
const tab = await (await browser.newContext({ viewport: { width: 1080, height: 1420 }, colorScheme: "light" })).newPage();
await tab.goto(pathToFileURL(resolve(page)).href);
await tab.screenshot({ path: png });
await browser.close();
