//! A stream whose reader must keep up.
//!
//! hyper bounds how long a request's head may take; nothing bounds how long a
//! client may take to read its answer. This does.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// A stream that fails with [`io::ErrorKind::TimedOut`] when what was written is
/// not taken within a time: counted from the first write that had to wait until
/// all is flushed, so that a reader who takes a byte now and then is cut off too.
#[derive(Debug)]
pub(super) struct WriteDeadline<S> {
    stream: S,
    limit: Duration,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S> WriteDeadline<S> {
    pub(super) fn new(stream: S, limit: Duration) -> Self {
        Self { stream, limit, waiting: None }
    }

    /// The stream without its deadline.
    pub(super) fn into_inner(self) -> S {
        self.stream
    }

    /// Passes `result` on, or the deadline's error when it is past.
    fn within<T>(
        &mut self,
        context: &mut Context<'_>,
        result: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if result.is_ready() {
            return result;
        }
        let waiting = self.waiting.get_or_insert_with(|| Box::pin(sleep(self.limit)));
        match waiting.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(Err(io::Error::new(
                io::ErrorKind::TimedOut,
                "the client does not read its answer",
            ))),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WriteDeadline<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteDeadline<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.within(context, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.within(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_flush(context);
        if matches!(result, Poll::Ready(Ok(()))) {
            self.waiting = None;
        }
        self.within(context, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.stream).poll_shutdown(context);
        self.within(context, result)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test]
    async fn a_reader_that_dribbles_is_cut_off() {
        let (here, mut there) = duplex(16);
        let mut here = WriteDeadline::new(here, Duration::from_millis(300));
        let reader = async {
            let mut byte = [0];
            while there.read(&mut byte).await.is_ok_and(|n| n == 1) {
                sleep(Duration::from_millis(50)).await;
            }
        };
        let writer = async {
            let error = here.write_all(&[0; 1024]).await.expect_err("cut off");
            assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        };
        tokio::select! { () = reader => panic!("the writer ends first"), () = writer => {} }
    }

    #[tokio::test]
    async fn a_pause_between_answers_is_none() {
        let (here, mut there) = duplex(16);
        let mut here = WriteDeadline::new(here, Duration::from_millis(300));
        let mut taken = [0; 24];
        for _ in 0..4 {
            let (sent, read) = tokio::join!(
                async {
                    here.write_all(&[7; 24]).await?;
                    here.flush().await
                },
                there.read_exact(&mut taken)
            );
            sent.expect("written");
            read.expect("read");
            sleep(Duration::from_millis(400)).await;
        }
    }
}
