//! An initramfs: a cpio archive of the new ASCII format, as the kernel unpacks it
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{
    collections::BTreeSet,
    fs,
    io::{self, Write},
    os::unix::fs::PermissionsExt as _,
    path::{Component, Path, PathBuf},
};

use anyhow::{Context as _, Result, bail};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const LINK: u32 = 0o120_000;

/// Writes an archive. Folders come into being with what is put into them.
pub(crate) struct Archive<W> {
    out: W,
    written: u64,
    inode: u32,
    names: BTreeSet<PathBuf>,
}

impl<W: Write> Archive<W> {
    /// An empty one.
    pub(crate) fn new(out: W) -> Self {
        Self { out, written: 0, inode: 0, names: BTreeSet::new() }
    }

    /// A folder, with those above it.
    ///
    /// # Errors
    /// The archive can't be written.
    pub(crate) fn folder(&mut self, path: &Path) -> Result<()> {
        let mut above = PathBuf::new();
        for part in path.components() {
            match part {
                Component::RootDir => {}
                Component::Normal(name) => {
                    above.push(name);
                    if self.names.insert(above.clone()) {
                        self.entry(&above, DIRECTORY | 0o755, &[])?;
                    }
                }
                _ => bail!("{} is no plain path", path.display()),
            }
        }
        Ok(())
    }

    /// A file with these bytes; the first of a name stays.
    ///
    /// # Errors
    /// The archive can't be written.
    pub(crate) fn bytes(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        self.put(path, REGULAR | (mode & 0o7777), bytes)
    }

    /// A symbolic link.
    ///
    /// # Errors
    /// The archive can't be written.
    pub(crate) fn link(&mut self, path: &Path, to: &str) -> Result<()> {
        self.put(path, LINK | 0o777, to.as_bytes())
    }

    /// A host's file, under its own name.
    ///
    /// # Errors
    /// It can't be read, or the archive can't be written.
    pub(crate) fn file(&mut self, path: &Path) -> Result<()> {
        let read =
            || -> io::Result<_> { Ok((fs::metadata(path)?.permissions().mode(), fs::read(path)?)) };
        let (mode, bytes) = read().with_context(|| format!("reading {}", path.display()))?;
        self.bytes(path, mode, &bytes)
    }

    /// A host's file or folder with all that is in it.
    ///
    /// # Errors
    /// One of them can't be read, or the archive can't be written.
    pub(crate) fn tree(&mut self, path: &Path) -> Result<()> {
        if !path.is_dir() {
            return self.file(path);
        }
        self.folder(path)?;
        let read = || -> io::Result<Vec<_>> { fs::read_dir(path)?.collect() };
        for entry in read().with_context(|| format!("reading {}", path.display()))? {
            self.tree(&entry.path())?;
        }
        Ok(())
    }

    fn put(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        let path = path.strip_prefix("/").unwrap_or(path);
        if let Some(folder) = path.parent() {
            self.folder(folder)?;
        }
        if self.names.insert(path.to_owned()) {
            self.entry(path, mode, bytes)?;
        }
        Ok(())
    }

    fn entry(&mut self, path: &Path, mode: u32, bytes: &[u8]) -> Result<()> {
        let name = path.to_str().with_context(|| format!("{} is no text", path.display()))?;
        self.inode += 1;
        let size = u32::try_from(bytes.len())
            .with_context(|| format!("{} is too large for an initramfs", path.display()))?;
        let links = 1 + u32::from(mode & DIRECTORY == DIRECTORY);
        // Inode, mode, uid, gid, links, mtime, size, device of the file and of what it
        // stands for, length of the name with its NUL, no check sum.
        let fields = [self.inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        let mut head = String::from("070701");
        for field in fields {
            head += &format!("{field:08X}");
        }
        self.write(head.as_bytes())?;
        self.write(name.as_bytes())?;
        self.write(&[0])?;
        self.pad()?;
        self.write(bytes)?;
        self.pad()
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// It can't be written.
    pub(crate) fn finish(mut self) -> Result<W> {
        self.entry(Path::new("TRAILER!!!"), 0, &[])?;
        self.out.flush().context("writing the initramfs")?;
        Ok(self.out)
    }

    fn pad(&mut self) -> Result<()> {
        let over = (self.written % 4) as usize;
        if over > 0 { self.write(&[0; 4][over..]) } else { Ok(()) }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes).context("writing the initramfs")?;
        self.written += bytes.len() as u64;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_kernels_format() {
        let mut archive = Archive::new(Vec::new());
        archive.bytes(Path::new("/a/b"), 0o755, b"hello").unwrap();
        archive.bytes(Path::new("/a/b"), 0o755, b"again").unwrap();
        archive.link(Path::new("/a/c"), "b").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let entries: Vec<&str> = text.split("070701").skip(1).collect();
        assert_eq!(entries.len(), 4, "{text}");
        let field = |entry: usize, number: usize| {
            u32::from_str_radix(&entries[entry][number * 8..][..8], 16).unwrap()
        };
        // Folder, file, link: mode, size, length of the name.
        assert_eq!((field(0, 1), field(0, 6), field(0, 11)), (0o040_755, 0, 2));
        assert_eq!((field(1, 1), field(1, 6), field(1, 11)), (0o100_755, 5, 4));
        assert_eq!((field(2, 1), field(2, 6)), (0o120_777, 1));
        // Head and name are padded together: 110 bytes and "a/b\0" make 116.
        assert!(entries[1][104..].starts_with("a/b\0\0\0hello\0\0\0"), "{:?}", entries[1]);
        assert!(entries[3][104..].starts_with("TRAILER!!!\0"));
        assert!(Archive::new(Vec::new()).folder(Path::new("/a/../b")).is_err());
    }
}
