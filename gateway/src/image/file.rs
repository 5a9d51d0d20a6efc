//! The catalog file.

use super::{ImageError, MAX_ENTRIES, entry::CatalogEntry};
use serde::Deserialize;
use std::{collections::BTreeSet, path::Path};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CatalogFile {
    #[serde(default)]
    image: Vec<CatalogEntry>,
}

/// Reads and checks it.
pub(super) fn read(path: &Path) -> Result<Vec<CatalogEntry>, ImageError> {
    let wrong = |message: String| ImageError::File { path: path.to_path_buf(), message };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let CatalogFile { image: entries } = toml::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    if entries.len() > MAX_ENTRIES {
        return Err(wrong(format!("{} images, at most {MAX_ENTRIES} are allowed", entries.len())));
    }
    let mut names = BTreeSet::new();
    for entry in &entries {
        entry.check().map_err(|error| wrong(error.to_string()))?;
        if !names.insert(&entry.name) {
            return Err(wrong(format!("two images are named {}", entry.name)));
        }
    }
    Ok(entries)
}
