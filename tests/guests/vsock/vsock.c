/* A program for a guest without a C library: has a shell's standard input and output be a vsock.
 *
 *     vsock connect PORT COMMAND    connects to the host
 *     vsock listen PORT COMMAND     waits for the host, and says so
 *
 *     cc -static -nostdlib -fno-stack-protector -O1 -o vsock vsock.c
 */

enum { WRITE = 1, DUP2 = 33, SOCKET = 41, CONNECT = 42, ACCEPT = 43, BIND = 49, LISTEN = 50, EXECVE = 59, EXIT = 60 };
enum { AF_VSOCK = 40, SOCK_STREAM = 1, CID_ANY = -1, CID_HOST = 2 };

struct address {
    unsigned short family, reserved;
    unsigned port, cid, flags;
};

static long call(long number, long a, long b, long c)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}

static long checked(long result)
{
    if (result < 0)
        call(EXIT, 1, 0, 0);
    return result;
}

__attribute__((used)) static void run(long *stack)
{
    static const char listening[] = "listening\n";
    char **arguments = (char **)(stack + 1), **environment = arguments + stack[0] + 1;
    char *shell[] = {"sh", "-c", arguments[3], 0};
    struct address address = {.family = AF_VSOCK};
    long stream = checked(call(SOCKET, AF_VSOCK, SOCK_STREAM, 0));

    for (char *digit = arguments[2]; *digit; digit++)
        address.port = address.port * 10 + (*digit - '0');
    if (arguments[1][0] == 'c') {
        address.cid = CID_HOST;
        checked(call(CONNECT, stream, (long)&address, sizeof address));
    } else {
        address.cid = CID_ANY;
        checked(call(BIND, stream, (long)&address, sizeof address));
        checked(call(LISTEN, stream, 1, 0));
        call(WRITE, 1, (long)listening, sizeof listening - 1);
        stream = checked(call(ACCEPT, stream, 0, 0));
    }
    checked(call(DUP2, stream, 0, 0));
    checked(call(DUP2, stream, 1, 0));
    checked(call(EXECVE, (long)"/bin/sh", (long)shell, (long)environment));
}

__asm__(".globl _start\n_start:\n\tmov %rsp, %rdi\n\tand $-16, %rsp\n\tcall run\n");
