//! The starts as a bar chart in SVG: a group for each function, a bar up to the P50 of each method,
//! a mark at its P99, on a logarithmic scale.

use std::fmt::Write;

use super::figures::{FunctionFigures, ROWS};

const BAR: u32 = 16;
const GROUP_GAP: u32 = 28;
const LEFT: u32 = 70;
const RIGHT: u32 = 20;
const TOP: u32 = 78;
const HEIGHT: u32 = 340;
const BOTTOM: u32 = 58;
/// Wide enough for title and legend.
const LEAST_WIDTH: u32 = 860;
const LEGEND_STEP: u32 = 78;

/// The colour of each row, told apart by people who see few colours, too.
fn colour(row: &str) -> &'static str {
    match row {
        "template" => "#0072b2",
        "parked" => "#56b4e9",
        "attach" => "#117733",
        "copy" => "#e69f00",
        "copy-base" => "#f5cf80",
        "lazy" => "#cc79a7",
        "reap" => "#009e73",
        "faasnap" => "#d55e00",
        "spice" => "#f0e442",
        "criu" => "#8c564b",
        "criu-lazy" => "#c49c94",
        "cold" => "#777777",
        _ => "#bbbbbb",
    }
}

/// One bar: which row, P50 and P99 in microseconds.
struct Bar {
    row: &'static str,
    p50: u64,
    p99: u64,
}

/// A scale on which each factor of ten is as high as the others.
struct Scale {
    low: f64,
    high: f64,
}

impl Scale {
    /// From a round figure below the least value to one above the greatest.
    fn of(values: impl Iterator<Item = u64> + Clone) -> Option<Self> {
        let least = values.clone().min()?.max(1) as f64;
        let most = values.max()?.max(1) as f64;
        let low = round(least / 1.2).rfind(|step| *step <= least / 1.2)?;
        let high = round(most).find(|step| *step >= most * 1.05)?;
        Some(Self { low, high })
    }

    fn height(&self, value: f64) -> f64 {
        let part = (value.max(self.low) / self.low).ln() / (self.high / self.low).ln();
        part.min(1.0) * f64::from(HEIGHT)
    }

    fn y(&self, value: f64) -> f64 {
        f64::from(TOP + HEIGHT) - self.height(value)
    }

    /// Where lines go.
    fn steps(&self) -> impl Iterator<Item = f64> {
        let (low, high) = (self.low, self.high);
        round(low).filter(move |step| (low..=high).contains(step))
    }
}

/// 1, 2, 5, 10, 20 and so on, from two decades below `around` to two above.
fn round(around: f64) -> impl DoubleEndedIterator<Item = f64> {
    let decade = around.log10().floor() as i32;
    (decade - 1..decade + 8).flat_map(|power| [1.0, 2.0, 5.0].map(|n| n * 10f64.powi(power)))
}

/// `2 ms` and the like.
fn label(micros: f64) -> String {
    match micros {
        ..1e3 => format!("{micros} us"),
        ..1e6 => format!("{} ms", micros / 1e3),
        _ => format!("{} s", micros / 1e6),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn bars(function: &FunctionFigures) -> Vec<Bar> {
    ROWS.into_iter()
        .filter_map(|row| {
            let series = &function.methods.get(row)?.start;
            Some(Bar {
                row,
                p50: series.quantile(0.5)?,
                p99: series.quantile(0.99)?,
            })
        })
        .collect()
}

/// The whole picture. A function without any start has an empty group.
pub fn svg(functions: &[FunctionFigures], subtitle: &str) -> String {
    let groups: Vec<Vec<Bar>> = functions.iter().map(bars).collect();
    let slots = groups.iter().map(Vec::len).max().unwrap_or(0).max(1);
    let group = u32::try_from(slots).unwrap_or(1) * BAR + GROUP_GAP;
    // A name needs about seven units for each letter.
    let name = functions.iter().map(|f| f.name.len()).max().unwrap_or(0);
    let group = group.max(u32::try_from(name).unwrap_or(0) * 7 + GROUP_GAP);
    let count = u32::try_from(groups.len()).unwrap_or(1);
    let width = (LEFT + group * count + RIGHT).max(LEAST_WIDTH);
    let height = TOP + HEIGHT + BOTTOM;
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = draw(
        &mut out,
        functions,
        &groups,
        group,
        (width, height),
        subtitle,
    );
    out
}

fn draw(
    out: &mut String,
    functions: &[FunctionFigures],
    groups: &[Vec<Bar>],
    group: u32,
    (width, height): (u32, u32),
    subtitle: &str,
) -> std::fmt::Result {
    writeln!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif" font-size="12" fill="#222222">"##
    )?;
    writeln!(
        out,
        r##"<rect width="{width}" height="{height}" fill="#ffffff"/>"##
    )?;
    writeln!(
        out,
        r##"<text x="{LEFT}" y="22" font-size="15" font-weight="bold">First byte of a call that starts a function: P50 (bar), P99 (mark)</text>"##
    )?;
    writeln!(
        out,
        r##"<text x="{LEFT}" y="39" fill="#666666">{}</text>"##,
        escaped(subtitle)
    )?;
    let present = |row: &&str| groups.iter().flatten().any(|bar| bar.row == *row);
    let mut x = LEFT;
    for row in ROWS.iter().filter(|row| present(row)) {
        writeln!(
            out,
            r##"<rect x="{x}" y="50" width="11" height="11" fill="{}" stroke="#444444" stroke-width="0.5"/><text x="{}" y="60">{row}</text>"##,
            colour(row),
            x + 15
        )?;
        x += LEGEND_STEP;
    }
    let values = groups.iter().flatten().flat_map(|bar| [bar.p50, bar.p99]);
    let Some(scale) = Scale::of(values) else {
        return writeln!(out, "</svg>");
    };
    let end = width - RIGHT;
    for step in scale.steps() {
        let y = scale.y(step);
        writeln!(
            out,
            r##"<line x1="{LEFT}" x2="{end}" y1="{y:.1}" y2="{y:.1}" stroke="#dddddd"/><text x="{}" y="{:.1}" text-anchor="end">{}</text>"##,
            LEFT - 6,
            y + 4.0,
            label(step)
        )?;
    }
    let floor = TOP + HEIGHT;
    for (index, (function, bars)) in functions.iter().zip(groups).enumerate() {
        let begin = LEFT + group * u32::try_from(index).unwrap_or(0);
        let middle = begin + group / 2;
        let wide = BAR * u32::try_from(bars.len()).unwrap_or(0);
        for (bar, nth) in bars.iter().zip(0..) {
            draw_bar(out, &scale, bar, middle - wide / 2 + BAR * nth)?;
        }
        writeln!(
            out,
            r##"<text x="{middle}" y="{}" text-anchor="middle">{}</text><text x="{middle}" y="{}" text-anchor="middle" fill="#666666">{:.0} MB</text>"##,
            floor + 20,
            escaped(&function.name),
            floor + 37,
            function.image_bytes as f64 / f64::from(1 << 20)
        )?;
    }
    writeln!(
        out,
        r##"<line x1="{LEFT}" x2="{end}" y1="{floor}" y2="{floor}" stroke="#222222"/>"##
    )?;
    writeln!(out, "</svg>")
}

fn draw_bar(out: &mut String, scale: &Scale, bar: &Bar, x: u32) -> std::fmt::Result {
    let (p50, p99) = (scale.y(bar.p50 as f64), scale.y(bar.p99 as f64));
    let middle = x + BAR / 2;
    writeln!(
        out,
        r##"<g><title>{}: P50 {}, P99 {}</title><rect x="{}" y="{p50:.1}" width="{}" height="{:.1}" fill="{}" stroke="#444444" stroke-width="0.5"/><path d="M{middle} {p50:.1}V{p99:.1}M{} {p99:.1}H{}" stroke="#222222" fill="none"/></g>"##,
        bar.row,
        crate::table::micros(bar.p50),
        crate::table::micros(bar.p99),
        x + 1,
        BAR - 2,
        scale.height(bar.p50 as f64),
        colour(bar.row),
        x + 3,
        x + BAR - 3,
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::figures::Starts;
    use super::*;

    fn function(name: &str, times: &[(&'static str, u64)]) -> FunctionFigures {
        let mut function = FunctionFigures {
            name: name.into(),
            ..FunctionFigures::default()
        };
        for (row, micros) in times {
            let mut starts = Starts::default();
            starts.start.record(Duration::from_micros(*micros));
            function.methods.insert(row, starts);
        }
        function
    }

    #[test]
    fn every_factor_of_ten_is_as_high_as_the_others() {
        let scale = Scale::of([1_500, 240_000].into_iter()).unwrap();
        assert!(scale.low <= 1_250.0 && scale.high >= 252_000.0);
        let step = scale.height(20_000.0) - scale.height(2_000.0);
        let next = scale.height(200_000.0) - scale.height(20_000.0);
        assert!(step > 50.0 && (step - next).abs() < 1e-9);
        assert!(scale.height(1e12) <= f64::from(HEIGHT));
    }

    #[test]
    fn each_method_that_was_measured_has_a_bar_and_names_are_escaped() {
        let functions = [
            function("a<b", &[("template", 2_000), ("runc", 150_000)]),
            function("none", &[]),
        ];
        let svg = svg(&functions, "x & y");
        assert_eq!(svg.matches("<title>").count(), 2);
        assert!(svg.contains("a&lt;b") && svg.contains("x &amp; y"));
        assert!(svg.contains(">10 ms<") && !svg.contains(">lazy<"));
    }

    #[test]
    fn nothing_measured_is_an_empty_picture() {
        assert!(svg(&[], "").trim_end().ends_with("</svg>"));
    }
}
