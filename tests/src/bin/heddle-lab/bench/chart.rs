//! The chart: how many times as dear each row is through the mesh, on a logarithmic scale where 1 is free.

use anyhow::{Context, Result};
use plotters::prelude::*;

use super::figures::Line;

const WIDTH: u32 = 960;
/// One bar with its gap, and everything above and below the bars (pixels).
const BAR: u32 = 20;
const AROUND: u32 = 130;
const NAMES: u32 = 300;

/// An SVG document.
pub fn draw(lines: &[Line], quick: bool) -> Result<String> {
    let bars: Vec<(&Line, f64)> = lines.iter().filter_map(|line| Some((line, line.cost()?))).collect();
    let mut svg = String::new();
    // Its own scope: the document is complete when the drawing is dropped.
    {
        let height = AROUND + BAR * u32::try_from(bars.len()).context("too many rows")?;
        let root = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        paint(&root, &bars, quick).map_err(|error| anyhow::anyhow!("drawing the chart: {error}"))?;
    }
    Ok(svg)
}

type Painted<'a> = Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>>;

fn paint<'a>(
    root: &DrawingArea<SVGBackend<'a>, plotters::coord::Shift>,
    bars: &[(&Line, f64)],
    quick: bool,
) -> Painted<'a> {
    root.fill(&WHITE)?;
    let largest = bars.iter().map(|(_, cost)| *cost).fold(2.0, f64::max) * 1.8;
    let smallest = bars.iter().map(|(_, cost)| *cost).fold(0.8, f64::min) / 1.2;
    let count = f64::from(u32::try_from(bars.len()).unwrap_or(u32::MAX));
    let title = if quick { "QUICK RUN: figures mean nothing" } else { "What the mesh costs: times no mesh, medians" };
    let mut chart = ChartBuilder::on(root)
        .caption(title, ("sans-serif", 20))
        .margin(15)
        .x_label_area_size(40)
        .y_label_area_size(NAMES)
        .build_cartesian_2d((smallest..largest).log_scale(), 0.0..count.max(1.0))?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_desc("log scale; 1 = as without the mesh, shorter is better")
        .x_label_formatter(&|value| format!("{value}"))
        .draw()?;
    for (index, (line, cost)) in (0_u32..).zip(bars) {
        let (top, bottom) = (count - f64::from(index) - 0.15, count - f64::from(index) - 0.85);
        let colour = match line.name.split('/').next() {
            Some("cross_node") => RGBColor(44, 110, 160),
            Some("same_node") => RGBColor(120, 160, 70),
            _ => RGBColor(170, 120, 60),
        };
        chart.draw_series([Rectangle::new([(1.0, bottom), (*cost, top)], colour.filled())])?;
        let (end, y) = chart.backend_coord(&(cost.max(1.0), top));
        root.draw(&Text::new(format!("{cost:.2}"), (end + 5, y), ("sans-serif", 12)))?;
        let name = format!("{}{}", line.name, if line.quiet { "" } else { " (disturbed)" });
        root.draw(&Text::new(name, (15, y), ("sans-serif", 12)))?;
    }
    root.present()
}

#[cfg(test)]
mod tests {
    use super::draw;
    use crate::bench::{
        figures::{Record, Sample, Way},
        rows::{Choice, Place},
    };

    #[test]
    fn a_bar_for_every_row_that_has_a_ratio() -> anyhow::Result<()> {
        let mut record = Record::default();
        for (way, value) in [(Way::None, 10.0), (Way::Mesh, 4.0)] {
            record.add(Place::SameNode, way, Sample::from([("http_c1".to_owned(), value)]), true);
        }
        record.add(Place::SameNode, Way::Mesh, Sample::from([("rss_idle".to_owned(), 4.0)]), true);
        let svg = draw(&record.lines(&Choice::new(&[])), false)?;
        assert!(svg.contains("same_node/http_c1") && svg.contains("2.50") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(!svg.contains("rss_idle"));
        Ok(())
    }
}
