//! The console for people who use a keyboard, a screen reader, a small screen or large text: the rules of WCAG
//! 2.2 AA that a program can check.

use serde_json::{Value, json};
use thirtyfour::prelude::*;

use super::browser::{Settings, in_browser, value, wait_for};
use super::search::SUMMARY;
use super::{HOSTILE, open, open_live};
use crate::processes::Processes;

/// Elements that break a rule, each as the rule and the beginning of its HTML.
const BROKEN_RULES: &str = r#"(() => {
    const all = (selector) => [...document.querySelectorAll(selector)];
    const broken = [];
    const expect = (rule, element, isKept) => {
        if (!isKept) broken.push(`${rule}: ${element.outerHTML.slice(0, 200)}`);
    };
    const page = document.documentElement;
    expect("the language is set", page, page.lang !== "");
    expect("the page has a title", page, document.title !== "");
    for (const landmark of ["header", "main", "footer"]) {
        expect(`one ${landmark}`, page, all(`body > ${landmark}`).length === 1);
    }
    for (const child of document.body.children) {
        expect("in a landmark", child, child.matches("header, main, footer"));
    }

    const textOf = (id) => document.getElementById(id)?.textContent.trim() ?? "";
    const named = (element) => {
        const ids = (element.getAttribute("aria-labelledby") ?? "").split(" ");
        return ids.every((id) => textOf(id) !== "") || Boolean(element.ariaLabel?.trim());
    };
    for (const control of all("input:not([type=hidden]), select, textarea")) {
        const labels = [...control.labels].map((label) => label.textContent.trim());
        expect("a control has a label", control, labels.join("") !== "" || named(control));
    }
    for (const control of all("button, a[href]")) {
        expect("a control has a text", control, control.textContent.trim() !== "" || named(control));
    }
    for (const area of all("section, nav, [role=region], [role=log], div[tabindex]")) {
        expect("an area has a name", area, named(area));
    }
    for (const picture of all("img, svg, canvas")) {
        const hasText = picture.hasAttribute("alt") || (picture.role === "img" && named(picture));
        expect("a picture has a text", picture, hasText || picture.ariaHidden === "true");
    }
    for (const table of all("table")) {
        expect("a table has a name", table, table.caption?.textContent.trim() || named(table));
        for (const row of table.rows) expect("a row has a header", row, row.querySelector("th"));
        for (const header of table.querySelectorAll("th")) {
            expect("a header has a scope", header, header.matches("[scope=col], [scope=row]"));
        }
    }
    for (const list of all("ul, ol")) {
        expect("a list has items", list, [...list.children].every((item) => item.tagName === "LI"));
    }

    let level = 0;
    for (const heading of all("h1, h2, h3, h4, h5, h6")) {
        const next = Number(heading.tagName[1]);
        expect("no level of headings is left out", heading, next <= level + 1);
        level = next;
    }
    expect("one h1", page, all("h1").length === 1);

    for (const element of all("[id]")) {
        expect("no id twice", element, all(`[id="${element.id}"]`).length === 1);
    }
    for (const attribute of ["for", "aria-labelledby", "aria-describedby", "aria-controls"]) {
        for (const element of all(`[${attribute}]`)) {
            for (const id of element.getAttribute(attribute).split(" ")) {
                expect("a reference leads to an element", element, document.getElementById(id));
            }
        }
    }
    for (const element of all("[tabindex]")) {
        expect("the order of the page is that of the keyboard", element, element.tabIndex <= 0);
    }
    return broken;
})()"#;

/// The contrast of each text to what is behind it, the least first: AA wants 4.5, or 3 for large text.
const CONTRASTS: &str = r#"(() => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const layer = (color) => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = color;
        context.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
        return { rgb: [r, g, b], alpha: a / 255 };
    };
    const over = (top, bottom) => {
        const alpha = top.alpha + bottom.alpha * (1 - top.alpha);
        const rgb = top.rgb.map((part, index) =>
            (part * top.alpha + bottom.rgb[index] * bottom.alpha * (1 - top.alpha)) / (alpha || 1));
        return { rgb, alpha };
    };
    const luminance = ({ rgb }) => {
        const [r, g, b] = rgb.map((part) => {
            const scaled = part / 255;
            return scaled <= 0.04045 ? scaled / 12.92 : ((scaled + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const contrast = (element) => {
        let text = layer(getComputedStyle(element).color);
        let ground = layer("transparent");
        for (let one = element; one !== null; one = one.parentElement) {
            const style = getComputedStyle(one);
            const background = layer(style.backgroundColor);
            [text, ground] = [text, ground].map((color) => {
                const { rgb, alpha } = over(color, background);
                return { rgb, alpha: alpha * Number(style.opacity) };
            });
        }
        const [a, b] = [text, ground].map((color) => luminance(over(color, layer("white"))));
        return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    };
    const hasText = (element) => element.checkVisibility() && [...element.childNodes].some(
        (node) => node.nodeType === Node.TEXT_NODE && node.data.trim() !== "");
    const texts = [...document.body.querySelectorAll("*")].filter(hasText);
    return texts
        .map((element) => [contrast(element), element.outerHTML.slice(0, 200)])
        .sort((one, other) => one[0] - other[0]);
})()"#;

/// The distance from the form of the search to the list of what it found.
const LIST_BELOW_FORM: &str = "document.getElementById('found-list').offsetTop \
                               - document.getElementById('search').offsetTop";

async fn assert_rules_are_kept(browser: &WebDriver) {
    assert_eq!(value(browser, BROKEN_RULES).await, json!([]));
    let contrasts = value(browser, CONTRASTS).await;
    let contrasts = contrasts.as_array().unwrap();
    assert!(contrasts.len() > 50);
    assert!(contrasts[0][0].as_f64() >= Some(4.5), "{}", contrasts[0]);
}

/// On a telephone, in a window of 1280 pixels at a zoom of 200 % (640) and 400 % (320), and in both color
/// schemes, while a problem is shown, also when the page is paused, and without JavaScript.
#[tokio::test(flavor = "multi_thread")]
async fn page_keeps_the_rules_on_each_screen() {
    let mut system = Processes::start();
    assert_eq!(system.post(HOSTILE).await.status(), 200);
    assert_eq!(system.post(&"long".repeat(1000)).await.status(), 200);
    system.logging[0].kill();
    for (width, is_dark) in [
        (1280, false),
        (640, true),
        (360, false),
        (360, true),
        (320, false),
    ] {
        let settings = Settings {
            is_dark,
            width: Some(width),
            ..Settings::default()
        };
        in_browser(settings, async |browser| {
            open_live(browser, &system).await;
            let before = value(browser, LIST_BELOW_FORM).await;
            let field = browser.find(By::Id("contains")).await.unwrap();
            field.send_keys("l" + Key::Enter).await.unwrap();
            wait_for(browser, SUMMARY, |now| *now != "" && *now != "Searching…").await;
            assert_eq!(value(browser, LIST_BELOW_FORM).await, before);
            let widths = "[innerWidth, document.documentElement.scrollWidth]";
            assert_eq!(value(browser, widths).await, json!([width, width]));
            let prefers = "matchMedia('(prefers-color-scheme: dark)').matches";
            assert_eq!(value(browser, prefers).await, is_dark);
            assert_rules_are_kept(browser).await;
            let pause = browser.find(By::Id("pause")).await.unwrap();
            pause.click().await.unwrap();
            assert_rules_are_kept(browser).await;
        })
        .await;
    }
    let settings = Settings {
        is_without_scripts: true,
        ..Settings::default()
    };
    in_browser(settings, async |browser| {
        open(browser, &system).await;
        assert_rules_are_kept(browser).await;
    })
    .await;
}

/// What a keyboard must reach, in the order of the page.
const CONTROLS: &str = r#"[...document.querySelectorAll("a[href], button, input, select, textarea, [tabindex]")]
    .filter((element) => element.checkVisibility() && !element.disabled)"#;

/// The place of the element that has the focus among the controls, and whether a line around it shows that.
const FOCUSED: &str = r#"(() => {
    const style = getComputedStyle(document.activeElement);
    const isSeen = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
    return [CONTROLS.indexOf(document.activeElement), isSeen];
})()"#;

#[tokio::test(flavor = "multi_thread")]
async fn keyboard_reaches_everything_and_shows_where_it_is() {
    let system = Processes::start();
    assert_eq!(system.post("hello").await.status(), 200);
    in_browser(Settings::default(), async |browser| {
        open_live(browser, &system).await;
        let count = value(browser, &format!("{CONTROLS}.length")).await;
        let count = count.as_u64().unwrap();
        assert!(count > 25, "{count}");
        let focused = FOCUSED.replace("CONTROLS", CONTROLS);
        for place in 0..count {
            let now = browser.active_element().await.unwrap();
            now.send_keys(Key::Tab + "").await.unwrap();
            let focus: Value = value(browser, &focused).await;
            assert_eq!(focus, json!([place, true]));
        }
    })
    .await;
}
