//! The same story as one page that needs nothing beside it, with a picture of the topology and its flows.

use std::fmt::Write as _;

use super::{
    report::{Line, Report},
    stage::Actor,
};

const STYLE: &str = "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1d2433;\
background:#fbfbfd}h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2rem;border-bottom:1px solid #d9dee8}\
li{list-style:none;margin:.2rem 0}ul{padding-left:.4rem}.good::before{content:'✓ ';color:#16803c;font-weight:700}\
.bad::before{content:'✗ ';color:#c0262d;font-weight:700}.detail{color:#647089;font-size:.9em}\
pre{background:#eef1f6;padding:.7rem;border-radius:.4rem;overflow-x:auto;font-size:.82rem}svg{width:100%;height:auto}\
.verdict{font-weight:700}@media(prefers-color-scheme:dark){body{background:#14171f;color:#dfe5f0}pre{background:#1f2430}\
h2{border-color:#333b4b}.detail{color:#93a0b8}}";

/// The whole page.
pub fn page(report: &Report, actors: &[Actor]) -> String {
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><meta name=\"viewport\" content=\"width=device-width\">\
         <title>heddle: the demonstration</title><style>{STYLE}</style><h1>{}</h1>",
        text(&report.headline)
    );
    let (good, bad) = report.counts();
    let _ = write!(
        page,
        "<p class=\"verdict\">{good} checks held, {bad} did not, in {:.1} s.</p>{}",
        report.took.as_secs_f64(),
        picture(actors)
    );
    for (number, scene) in report.scenes.iter().enumerate() {
        let _ = write!(page, "<h2>{}. {}</h2><ul>", number + 1, text(&scene.title));
        for line in &scene.lines {
            let _ = match line {
                Line::Check { good, claim, detail } => write!(
                    page,
                    "<li class=\"{}\">{} <span class=\"detail\">{}</span></li>",
                    if *good { "good" } else { "bad" },
                    text(claim),
                    text(detail)
                ),
                Line::Note(note) => write!(page, "<li class=\"detail\">{}</li>", text(note)),
                Line::Quote(lines) if lines.is_empty() => Ok(()),
                Line::Quote(lines) => write!(page, "<li><pre>{}</pre></li>", text(&lines.join("\n"))),
            };
        }
        page.push_str("</ul>");
    }
    page.push_str("</html>\n");
    page
}

/// Nodes as boxes, pods in them, the agent of each node below its pods, and the flows between them.
fn picture(actors: &[Actor]) -> String {
    const WIDTH: u32 = 250;
    const HEIGHT: u32 = 58;
    let left = |node: u8| if node == 1 { 40 } else { 610 };
    let mut svg = String::from(
        "<svg viewBox=\"0 0 900 430\" role=\"img\" aria-label=\"Two nodes with their pods and agents; mutual TLS between the \
         agents\" font-family=\"system-ui,sans-serif\" font-size=\"13\"><defs><marker id=\"tip\" viewBox=\"0 0 8 8\" \
         refX=\"7\" refY=\"4\" markerWidth=\"7\" markerHeight=\"7\" orient=\"auto-start-reverse\"><path d=\"M0 0 8 4 0 8z\" \
         fill=\"#2456c9\"/></marker></defs>",
    );
    for node in [1, 2] {
        let x = left(node) - 20;
        let _ = write!(
            svg,
            "<rect x=\"{x}\" y=\"20\" width=\"290\" height=\"390\" rx=\"12\" fill=\"#7f8fb022\" stroke=\"#7f8fb0\"/>\
             <text x=\"{}\" y=\"44\" font-weight=\"700\" fill=\"#7f8fb0\">node{node}</text>",
            x + 16
        );
        let _ = write!(
            svg,
            "<rect x=\"{}\" y=\"340\" width=\"{WIDTH}\" height=\"50\" rx=\"8\" fill=\"#2456c9\"/>\
             <text x=\"{}\" y=\"370\" text-anchor=\"middle\" fill=\"#fff\" font-weight=\"700\">heddle agent</text>",
            left(node),
            left(node) + WIDTH / 2
        );
        for (slot, actor) in (0_u32..).zip(actors.iter().filter(|actor| actor.node == node)) {
            let (x, y) = (left(node), 58 + slot * 68);
            let colour = if actor.meshed { "#16803c" } else { "#9a6b00" };
            let _ = write!(
                svg,
                "<rect x=\"{x}\" y=\"{y}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"8\" fill=\"{colour}22\" stroke=\"{colour}\"/>\
                 <text x=\"{}\" y=\"{}\" font-weight=\"700\" fill=\"{colour}\">{}</text>\
                 <text x=\"{}\" y=\"{}\" fill=\"{colour}\" font-size=\"11\">{}</text>\
                 <text x=\"{}\" y=\"{}\" fill=\"{colour}\" font-size=\"10\">{}</text>",
                x + 12,
                y + 20,
                text(&format!("{} · {}", actor.name, actor.software)),
                x + 12,
                y + 36,
                text(&actor.address),
                x + 12,
                y + 50,
                text(if actor.meshed { &actor.identity } else { "no identity: plain text" }),
            );
        }
    }
    svg.push_str(
        "<line x1=\"292\" y1=\"365\" x2=\"606\" y2=\"365\" stroke=\"#2456c9\" stroke-width=\"4\" marker-start=\"url(#tip)\" \
         marker-end=\"url(#tip)\"/><text x=\"449\" y=\"352\" text-anchor=\"middle\" fill=\"#2456c9\" font-weight=\"700\">HBONE in \
         TLS 1.3, both ends proven</text><text x=\"449\" y=\"386\" text-anchor=\"middle\" fill=\"#7f8fb0\">recorded here: no \
         application byte</text><line x1=\"292\" y1=\"222\" x2=\"606\" y2=\"150\" stroke=\"#9a6b00\" stroke-width=\"2\" \
         stroke-dasharray=\"6 5\" marker-end=\"url(#tip)\"/><text x=\"449\" y=\"166\" text-anchor=\"middle\" \
         fill=\"#9a6b00\">plain text: only while PERMISSIVE</text></svg>",
    );
    svg
}

/// Text as HTML.
fn text(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
