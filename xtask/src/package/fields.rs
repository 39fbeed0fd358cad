//! What a package says of itself: version, architecture, dependencies.

use std::{
    fs,
    path::Path,
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail};

use super::output_of;

/// The newest entry of `packaging/debian/changelog`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Release {
    /// The package's version: the workspace's, and the package's own behind a `-`.
    pub(super) version: String,
    /// When it was made, in seconds since 1970: every build of it has the same times.
    pub(super) epoch: u64,
}

impl Release {
    /// Reads it, and holds it against the workspace's version.
    ///
    /// # Errors
    /// The changelog can't be read, or is about another version.
    pub(super) fn read(workspace: &Path) -> Result<Self> {
        let path = workspace.join("packaging/debian/changelog");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let version = newest(&text)
            .with_context(|| format!("{} begins with no version", path.display()))?
            .to_owned();
        let upstream = version.rsplit_once('-').map_or("", |(upstream, _)| upstream);
        if upstream != env!("CARGO_PKG_VERSION") {
            bail!(
                "{} begins with version {version}, and the workspace is at {}: add an entry",
                path.display(),
                env!("CARGO_PKG_VERSION")
            );
        }
        let mut date = Command::new("date");
        date.arg("--date").arg(dated(&text).context("the changelog's first entry has no date")?);
        let seconds = output_of(date.arg("+%s"))?;
        let epoch: u64 = String::from_utf8_lossy(&seconds).trim().parse()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        // Before an entry is dated, files would be from the future.
        Ok(Self { version, epoch: epoch.min(now) })
    }
}

/// The version of the first entry: `NAME (VERSION) …`.
fn newest(changelog: &str) -> Option<&str> {
    let (_, rest) = changelog.lines().next()?.split_once('(')?;
    Some(rest.split_once(')')?.0)
}

/// The date of the first entry: ` -- NAME <ADDRESS>  DATE`.
fn dated(changelog: &str) -> Option<&str> {
    let line = changelog.lines().find(|line| line.starts_with(" -- "))?;
    Some(line.split_once(">  ")?.1)
}

/// This host's architecture in Debian's words.
///
/// # Errors
/// The agent is not made for it.
pub(super) fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("{other} hosts are not supported: x86_64 and aarch64 are"),
    }
}

/// The file `control`: `packaging/debian/control` with what only the build knows.
/// `maintainer` takes the place of the one that is named there.
pub(super) fn control(
    template: &str,
    release: &Release,
    libraries: &[String],
    installed_kib: u64,
    maintainer: Option<&str>,
) -> Result<String> {
    let mut text = String::new();
    for line in template.lines() {
        match line.split_once(": ") {
            Some(("Section", _)) => {
                text += &format!(
                    "Version: {}\nArchitecture: {}\nInstalled-Size: {installed_kib}\n",
                    release.version,
                    architecture()?
                );
                text += line;
            }
            Some(("Maintainer", named)) => {
                text += &format!("Maintainer: {}", maintainer.unwrap_or(named));
            }
            Some(("Depends", named)) => {
                let all = libraries.iter().map(String::as_str).chain([named]);
                text += &format!("Depends: {}", all.collect::<Vec<_>>().join(", "));
            }
            _ => text += line,
        }
        text.push('\n');
    }
    Ok(text)
}

/// Whoever builds for others, in the words of Debian's tools (dch(1)).
pub(super) fn maintainer() -> Option<String> {
    let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    Some(format!("{} <{}>", variable("DEBFULLNAME")?, variable("DEBEMAIL")?))
}

/// Packages with the libraries that a program needs, in the versions that it needs.
///
/// # Errors
/// readelf fails, or a library is of a package that is not known here.
pub(super) fn libraries(binary: &Path) -> Result<Vec<String>> {
    let text = output_of(Command::new("readelf").args(["--wide", "-V"]).arg(binary))?;
    packages(&String::from_utf8_lossy(&text))
}

/// The same from the version needs as readelf shows them: a line with `File: NAME` for each
/// library, and after it lines with `Name: PREFIX_VERSION`.
fn packages(needs: &str) -> Result<Vec<String>> {
    /// Package, and the prefix of its symbols' versions.
    type Of = (&'static str, &'static str);
    let mut newest: Vec<(Of, Vec<u32>)> = Vec::new();
    let mut current: Option<Of> = None;
    for line in needs.lines() {
        let word = |key: &str| {
            let (_, rest) = line.split_once(key)?;
            rest.split_whitespace().next()
        };
        if let Some(file) = word("File: ") {
            current = Some(match file {
                "libgcc_s.so.1" => ("libgcc-s1", "GCC_"),
                _ if file.starts_with("ld-linux") => ("libc6", "GLIBC_"),
                "libc.so.6" | "libm.so.6" => ("libc6", "GLIBC_"),
                _ => bail!("the program needs {file}, which is of a package that is not known"),
            });
        } else if let (Some(of), Some(name)) = (current, word("Name: "))
            && let Some(version) = name.strip_prefix(of.1)
        {
            let parts = || version.split('.').map(str::parse).collect::<Result<Vec<u32>, _>>();
            let Ok(version) = parts() else { continue };
            match newest.iter_mut().find(|(one, _)| one.0 == of.0) {
                Some((_, known)) if *known >= version => {}
                Some((_, known)) => *known = version,
                None => newest.push((of, version)),
            }
        }
    }
    let mut all: Vec<String> = newest
        .into_iter()
        .map(|((package, _), version)| {
            let version: Vec<String> = version.iter().map(ToString::to_string).collect();
            format!("{package} (>= {})", version.join("."))
        })
        .collect();
    all.sort();
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDS: &str = "\
Version needs section '.gnu.version_r' contains 3 entries:
 Addr: 0x0000000000000ed8  Offset: 0x000ed8  Link: 6 (.dynstr)
  000000: Version: 1  File: libgcc_s.so.1  Cnt: 2
  0x0010:   Name: GCC_4.2.0  Flags: none  Version: 5
  0x0020:   Name: GCC_3.0  Flags: none  Version: 4
  0x0030: Version: 1  File: libc.so.6  Cnt: 2
  0x0040:   Name: GLIBC_2.9  Flags: none  Version: 3
  0x0050:   Name: GLIBC_2.34  Flags: none  Version: 2
  0x0060: Version: 1  File: libm.so.6  Cnt: 1
  0x0070:   Name: GLIBC_2.29  Flags: none  Version: 6
";

    #[test]
    fn a_program_depends_on_the_newest_version_that_it_names() {
        let all = packages(NEEDS).unwrap();
        assert_eq!(all, ["libc6 (>= 2.34)", "libgcc-s1 (>= 4.2.0)"]);
        assert!(packages("No version information found in this file.").unwrap().is_empty());
        assert!(packages("  File: libssl.so.3  Cnt: 1").is_err());
    }

    #[test]
    fn the_changelog_is_about_this_version() {
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let release = Release::read(&workspace).unwrap();
        assert!(release.epoch > 1_700_000_000, "{release:?}");
        assert_eq!(newest("a (1.0-2) unstable; urgency=low\n"), Some("1.0-2"));
        assert_eq!(newest("a\n"), None);
        assert_eq!(dated("a (1)\n\n  * b\n\n -- A <b@c>  Sat, 1 Jan\n"), Some("Sat, 1 Jan"));
    }

    #[test]
    fn what_only_the_build_knows_is_put_in() {
        let template = "Package: p\nSection: net\nMaintainer: A <b>\nDepends: systemd\n d: e\n";
        let release = Release { version: "1-1".to_owned(), epoch: 0 };
        let text = control(template, &release, &["libc6 (>= 2.34)".to_owned()], 7, None).unwrap();
        let architecture = architecture().unwrap();
        assert_eq!(
            text,
            format!(
                "Package: p\nVersion: 1-1\nArchitecture: {architecture}\nInstalled-Size: 7\n\
                 Section: net\nMaintainer: A <b>\nDepends: libc6 (>= 2.34), systemd\n d: e\n"
            )
        );
        let other = control(template, &release, &[], 7, Some("C <d>")).unwrap();
        assert!(other.contains("\nMaintainer: C <d>\nDepends: systemd\n"), "{other}");
    }
}
