//! That findings can be shown: each place is in a file that was read.
//!
//! A file of its own, because the fuzz target of the configuration has it as well.

use std::path::Path;

use canary_agent::config::{Diagnostic, render};

/// Every place must lie in a file that was read: its line exists, its column
/// is in the line or just behind it.
pub(crate) fn check_places(files: &[(&Path, &[u8])], diagnostics: &[Diagnostic]) {
    for diagnostic in diagnostics {
        let places = diagnostic.related.iter().map(|related| &related.place);
        for place in places.chain([&diagnostic.place]) {
            let (_, bytes) = files
                .iter()
                .find(|(name, _)| *name == Path::new(&place.file))
                .unwrap_or_else(|| panic!("{diagnostic:?} is in no file"));
            let text = String::from_utf8_lossy(bytes);
            let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
            let line = text
                .split('\n')
                .nth(place.line as usize - 1)
                .unwrap_or_else(|| panic!("{diagnostic:?} is behind the last line"));
            let line = line.strip_suffix('\r').unwrap_or(line);
            assert!(
                (1..=line.chars().count() + 1).contains(&(place.column as usize)),
                "{diagnostic:?} is behind its line"
            );
            let Some(excerpt) = &place.excerpt else {
                continue;
            };
            assert!(excerpt.offset as usize <= excerpt.text.chars().count());
            assert!(excerpt.width >= 1 && excerpt.width <= 120);
        }
    }
    // It must be possible to show and to send it.
    assert!(render(diagnostics).lines().count() >= diagnostics.len());
    let json = serde_json::to_string(diagnostics).expect("serialisable");
    let back: Vec<Diagnostic> = serde_json::from_str(&json).expect("reads back");
    assert_eq!(back, diagnostics);
}
