//! Pages of figures, with bars, that need nothing from elsewhere.

use std::fmt::Write as _;

use anyhow::Result;

const STYLE: &str = "\
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #8884; }
th:first-child, td:first-child { text-align: left; }
svg { width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: currentColor; }
.bar { fill: #3b7dd8; }
.floor { fill: #8a8f98; }
.line { stroke: #d8663b; stroke-dasharray: 4 3; }
";

/// Places in a plot: where bars begin, how long the longest is, and how high a row is.
const LEFT: f64 = 230.0;
const LONGEST: f64 = 560.0;
const HIGH: f64 = 18.0;

/// Text in a page.
pub(crate) fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The beginning of a page.
pub(crate) fn begin(title: &str) -> Result<String> {
    let mut page = String::new();
    writeln!(
        page,
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    )?;
    Ok(page)
}

/// Its end.
pub(crate) fn end(page: &mut String) -> Result<()> {
    Ok(writeln!(page, "</body>\n</html>")?)
}

/// A bar of a plot.
pub(crate) struct Bar<'a> {
    pub(crate) name: &'a str,
    pub(crate) value: f64,
    /// What it looks like: `bar` or `floor`.
    pub(crate) class: &'a str,
}

/// Bars with their values, of so many digits, and a line, if there is one, at a value.
pub(crate) fn plot(
    page: &mut String,
    bars: &[Bar<'_>],
    line: Option<f64>,
    digits: usize,
) -> Result<()> {
    let most = bars.iter().map(|bar| bar.value).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let width = |value: f64| (value / most * LONGEST).max(0.0);
    let height = bars.len() as f64 * HIGH;
    writeln!(page, "<svg viewBox=\"0 0 {} {height}\" role=\"img\">", LEFT + LONGEST + 60.0)?;
    for (nth, Bar { name, value, class }) in bars.iter().enumerate() {
        let top = nth as f64 * HIGH;
        writeln!(
            page,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\">{}</text>\
             <rect class=\"{class}\" x=\"{LEFT}\" y=\"{}\" width=\"{:.1}\" height=\"{}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{value:.digits$}</text>",
            LEFT - 8.0,
            top + 13.0,
            escaped(name),
            top + 2.0,
            width(*value),
            HIGH - 4.0,
            LEFT + width(*value) + 6.0,
            top + 13.0
        )?;
    }
    if let Some(value) = line {
        let x = LEFT + width(value);
        writeln!(
            page,
            "<line class=\"line\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{height}\"/>"
        )?;
    }
    writeln!(page, "</svg>")?;
    Ok(())
}
