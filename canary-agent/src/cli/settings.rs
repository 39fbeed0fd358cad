//! What the commands need of the configuration: paths of `[agent]`.
//!
//! The commands read them by themselves and forgive everything else: while
//! somebody edits a service, `status` must still find the running agent.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Why a path could not be looked up.
#[derive(Debug, thiserror::Error)]
#[error("{}: {reason}", file.display())]
pub(super) struct Unreadable {
    /// The file.
    pub(super) file: PathBuf,
    reason: String,
    /// It is not there at all.
    pub(super) missing: bool,
}

/// The path under `agent.KEY`, from the configuration and `conf.d` beside it.
///
/// # Errors
/// A file can't be read, or is not TOML.
pub(super) fn agent_path(config: &Path, key: &str) -> Result<Option<PathBuf>, Unreadable> {
    let mut found = look(config, key)?;
    for file in fragments(config) {
        found = look(&file, key)?.or(found);
    }
    Ok(found)
}

fn look(file: &Path, key: &str) -> Result<Option<PathBuf>, Unreadable> {
    let unreadable =
        |reason: String, missing| Unreadable { file: file.to_owned(), reason, missing };
    let text = fs::read_to_string(file)
        .map_err(|error| unreadable(error.to_string(), error.kind() == io::ErrorKind::NotFound))?;
    let table: toml::Table = text
        .parse()
        .map_err(|error: toml::de::Error| unreadable(error.message().to_owned(), false))?;
    let value = table.get("agent").and_then(|agent| agent.get(key));
    Ok(value.and_then(toml::Value::as_str).map(PathBuf::from))
}

/// `conf.d/*.toml` beside the configuration, in name order, without hidden files.
fn fragments(config: &Path) -> Vec<PathBuf> {
    let directory = config.with_file_name("conf.d");
    let mut files: Vec<PathBuf> = fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.extension().is_some_and(|extension| extension == "toml"))
        .filter(|path| {
            let name = path.file_name().map(|name| name.as_encoded_bytes());
            name.is_some_and(|name| !name.starts_with(b"."))
        })
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_found_whatever_else_is_wrong() {
        let dir = tempfile::tempdir().expect("a directory");
        let config = dir.path().join("agent.toml");
        assert!(agent_path(&config, "socket").expect_err("not there").missing);

        let text = "nonsense = 1\n[agent]\nsocket = \"/a\"\n[[service]]\nname = 7\n";
        fs::write(&config, text).expect("written");
        let read = |key| agent_path(&config, key).expect("TOML");
        assert_eq!(read("socket"), Some("/a".into()));
        assert_eq!(read("bpffs"), None);

        fs::create_dir(dir.path().join("conf.d")).expect("made");
        let fragment = dir.path().join("conf.d/10-paths.toml");
        fs::write(&fragment, "[agent]\nbpffs = \"/b\"\n").expect("written");
        assert_eq!(read("socket"), Some("/a".into()));
        assert_eq!(read("bpffs"), Some("/b".into()));

        fs::write(&fragment, "[agent\n").expect("written");
        let error = agent_path(&config, "socket").expect_err("no TOML");
        assert_eq!(error.file, fragment);
        assert!(!error.missing);
    }
}
